"""The controller's calls to one worker: barista.v1.Experts over asyncio, and what their failures mean."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import Any

import grpc

from barista.placement import ExpertKey
from barista.trust import TLS_NAME, Trust
from barista.v1 import experts_pb2 as pb
from barista.v1.experts_pb2_grpc import ExpertsStub
from experts.controller.member import Description
from experts.controller.wire import by_layer, description_of, digests_of

DESCRIBE_SECONDS = 2.0
CALL_SECONDS = 10.0
STALL_SECONDS = 120.0  # a worker that loads reports each layer; the largest come from a slow disk in this time


class CallFailed(OSError):
    """A call without an answer, with the reason in words.

    gone: whoever listens at the address, if anybody, is not this pool's worker. silent: no answer came in time.
    """

    def __init__(self, reason: str, *, gone: bool = False, silent: bool = False) -> None:
        super().__init__(reason)
        self.gone = gone
        self.silent = silent


class WorkerCalls:
    """One worker at host:port. Every call raises CallFailed."""

    def __init__(self, channel: grpc.aio.Channel, address: str, trust: Trust, stall_seconds: float) -> None:
        self._stub: Any = ExpertsStub(channel)
        self._address = address
        self._metadata = trust.metadata
        self._stall_seconds = stall_seconds

    async def describe(self) -> Description:
        """What the worker is and holds."""
        return description_of(await self._call("Describe", pb.DescribeRequest(), DESCRIBE_SECONDS))

    async def drain(self, draining: bool) -> None:
        """Let the worker say that it does not serve, or that it does."""
        await self._call("Drain", pb.DrainRequest(draining=draining), DESCRIBE_SECONDS)

    async def assign(
        self, experts: Iterable[ExpertKey], term: int, epoch: int
    ) -> AsyncGenerator[dict[ExpertKey, bytes]]:
        """Let the worker load experts: the digests of what it has loaded since the last report, as they come."""
        request = pb.AssignRequest(term=term, epoch=epoch, experts=by_layer(experts))
        call = self._stub.Assign(request, metadata=self._metadata)
        try:
            while True:
                async with asyncio.timeout(self._stall_seconds):
                    progress = await call.read()
                if progress is grpc.aio.EOF:
                    return
                yield digests_of(progress.loaded)
        except TimeoutError:
            raise CallFailed(
                f"It has loaded nothing for {self._stall_seconds:.0f} s. Check the disk that has its checkpoint.",
                silent=True,
            ) from None
        except grpc.aio.AioRpcError as error:
            raise failure(self._address, error) from error
        finally:
            call.cancel()

    async def release(self, experts: Iterable[ExpertKey], term: int, epoch: int) -> None:
        """Let the worker forget experts."""
        await self._call("Release", pb.ReleaseRequest(term=term, epoch=epoch, experts=by_layer(experts)), CALL_SECONDS)

    async def probe(self, key: ExpertKey, row: bytes) -> bytes:
        """One expert's row for one row."""
        reply = await self._call("Probe", pb.ProbeRequest(layer=key[0], expert=key[1], row=row), CALL_SECONDS)
        answer: bytes = reply.row
        return answer

    async def _call(self, method: str, request: Any, seconds: float) -> Any:
        try:
            return await getattr(self._stub, method)(request, timeout=seconds, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise failure(self._address, error) from error


def failure(address: str, error: grpc.aio.AioRpcError) -> CallFailed:
    """What gRPC's error means for people, with a remedy where there is one."""
    code, details = error.code(), error.details() or error.code().name
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return CallFailed("It does not answer.", silent=True)
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return CallFailed(
            f"What listens at {address} refuses this pool's token: it belongs to another pool, or to none. "
            "End that process.",
            gone=True,
        )
    if code is not grpc.StatusCode.UNAVAILABLE:
        return CallFailed(details)
    if any(word in details.lower() for word in ("handshake", "ssl", "certificate")):
        return CallFailed(
            f"{address} and the controller do not trust each other: {details}. Each host's --tls-dir needs the same "
            f"ca.pem, and a cert.pem that it has signed, valid now, for the name {TLS_NAME}.",
            gone=True,
        )
    if "socket closed" in details.lower():
        details += ". If a process listens there, compare its --tls-dir with the controller's."
    return CallFailed(f"Nobody answers at {address}: {details}", gone=True)
