"""The API's side of a pool's controller: what it knows, and what operators ask of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc

from barista.errors import EngineFailed, InvalidRequest, NotFound, Overloaded, RequestError
from barista.trust import Trust
from barista.v1 import controller_pb2 as pb
from barista.v1.controller_pb2_grpc import ControllerStub
from router.messages import PoolAddress

STATE_SECONDS = 1.0
COMMAND_SECONDS = 600.0  # moving every expert of a worker reads them from a disk

Reply = TypeVar("Reply")


class PoolClient:
    """One pool's controller. address: gives None until the pool has started.

    Every call raises RequestError: 404 for an unknown worker, 400 or 422 for what the controller refuses (never 409,
    which clients retry), 503 while it does not answer.
    """

    def __init__(self, address: Callable[[], PoolAddress | None]) -> None:
        self._address = address
        self._trust: Trust | None = None
        self._channel: grpc.aio.Channel | None = None
        self._connected: PoolAddress | None = None
        self._old: list[grpc.aio.Channel] = []  # of controllers that have moved; calls may still be under way

    async def state(self) -> pb.PoolState:
        """The pool as it is."""
        return await self._call(lambda stub, how: stub.GetState(pb.GetStateRequest(), **how), STATE_SECONDS)

    async def drain(self, worker: str) -> pb.PoolState:
        """Move every expert off a worker; returns when that is done."""
        return await self._call(lambda stub, how: stub.Drain(pb.DrainWorkerRequest(worker=worker), **how))

    async def scale(self, workers: int) -> pb.PoolState:
        """Start or stop workers until there are so many; returns when that is done."""
        return await self._call(lambda stub, how: stub.Scale(pb.ScaleRequest(workers=workers), **how))

    async def rebalance(self, *, dry_run: bool) -> pb.RebalanceReply:
        """Even out the load. Returns the moves, which are not made if dry_run."""
        return await self._call(lambda stub, how: stub.Rebalance(pb.RebalanceRequest(dry_run=dry_run), **how))

    async def close(self) -> None:
        """End the connections. Idempotent."""
        for channel in (*self._old, *filter(None, [self._channel])):
            await channel.close()
        self._old, self._channel, self._connected = [], None, None

    async def _call(self, call: Callable[[Any, Any], Awaitable[Reply]], seconds: float = COMMAND_SECONDS) -> Reply:
        stub, trust = self._connect()
        try:
            return await call(stub, {"metadata": trust.metadata, "timeout": seconds})
        except grpc.aio.AioRpcError as error:
            raise request_error(error.code(), error.details() or "") from error

    def _connect(self) -> tuple[Any, Trust]:
        """A channel belongs to the event loop that it was opened in, so it is opened at the first call."""
        address = self._address()
        if address is None:
            raise Overloaded("The pool is still starting.", code="not_ready", retry_after=1)
        if address != self._connected:
            if self._channel is not None:
                self._old.append(self._channel)
            self._connected, self._channel, self._trust = address, None, None
        if self._trust is None:
            self._trust = Trust(address.token, None if address.tls_dir is None else Path(address.tls_dir))
        if self._channel is None:
            self._channel = self._trust.aio_channel(address.controller)
        return ControllerStub(self._channel), self._trust


def request_error(code: grpc.StatusCode, details: str) -> RequestError:
    """What a client is told when the controller ends a call with `code`; `details` is the controller's own message."""
    match code:
        case grpc.StatusCode.NOT_FOUND:
            return NotFound(details, param="worker", code="worker_not_found")
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequest(details, code="invalid_argument")
        case grpc.StatusCode.FAILED_PRECONDITION | grpc.StatusCode.RESOURCE_EXHAUSTED:
            return InvalidRequest(details, status=422, code="refused_by_the_pool")
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            text = "The pool's controller does not answer. Try again in a moment."
            return EngineFailed(text, status=503, code="controller_unavailable", retry_after=1)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            text = "The pool's controller has not finished in time; see `barista status` for where it stands."
            return EngineFailed(text, status=503, code="controller_busy", retry_after=5)
        case _:
            return EngineFailed(f"The pool's controller failed: {code.name}.", code="controller_failed")
