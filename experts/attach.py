"""From a worker's address to a link: the engine's end of Exchange, and of the calls beside it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import torch
from google.protobuf.message import DecodeError

from barista.protocol import PROTOCOL_VERSION
from barista.trust import Trust, with_remedy
from barista.v1 import experts_pb2 as pb
from barista.v1 import experts_pb2_grpc
from experts.expert_model import ExpertModel
from experts.link import Link, LinkDown
from experts.transport.grpc import ExchangeStream, GrpcLink
from experts.transport.shm import ShmLink
from experts.transport.window import Window, WindowRefused, create_window

log = logging.getLogger(__name__)

ATTACH_SECONDS = 5.0
CALL_SECONDS = 5.0
STALL_SECONDS = 30.0  # between two reports of a worker that loads

_DTYPES = {"float32": pb.ROW_DTYPE_FLOAT32, "bfloat16": pb.ROW_DTYPE_BFLOAT16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What an engine says of itself. max_rows: the most rows of one step."""

    engine_id: str
    model: ExpertModel
    numerics_id: str
    max_rows: int


def attach(address: str, hello: Hello, trust: Trust, transport: str = "auto") -> Link:
    """Attach to the worker at host:port.

    transport: "grpc", "shm", or "auto": shared memory where both ends share a host, else the stream. Raises LinkDown
    with the reason when the worker refuses us, cannot be reached, or has not answered within 5 s.
    """
    window, no_window = (None, "") if transport == "grpc" else _offer(hello)
    if window is None and transport == "shm":
        raise LinkDown(f"{address}: no shared memory: {no_window}")
    stream = ExchangeStream(address, trust)
    try:
        attached = _greet(stream, hello, window)
        if window is not None and attached.window_accepted:
            return _AttachedShmLink(window, stream)
        if transport == "shm":
            raise LinkDown(f"{address}: no shared memory: {attached.window_refusal}")
    except LinkDown as error:
        stream.close()
        raise LinkDown(with_remedy(str(error))) from error
    except BaseException:
        stream.close()
        raise
    finally:
        if window is not None:
            window.unlink()
    if transport == "auto":
        log.info("%s: rows travel over gRPC: %s", address, no_window or attached.window_refusal)
    model = hello.model
    return GrpcLink(stream, model.hidden_size, model.top_k, getattr(torch, model.dtype), hello.max_rows)


class _AttachedShmLink(ShmLink):
    """A window, and the stream that says that its other end lives."""

    def __init__(self, window: Window, stream: ExchangeStream) -> None:
        super().__init__(window, stream.when_ended)
        self._stream = stream

    def close(self) -> None:
        super().close()
        self._stream.close()


def _offer(hello: Hello) -> tuple[Window | None, str]:
    """A window for this worker, or why there can be none."""
    model = hello.model
    try:
        return create_window(hello.max_rows, model.top_k, model.hidden_size, getattr(torch, model.dtype)), ""
    except OSError as error:
        return None, f"/dev/shm: {error.strerror}"
    except WindowRefused as error:
        return None, str(error)


def _greet(stream: ExchangeStream, hello: Hello, window: Window | None) -> pb.Attached:
    model = hello.model
    attach_message = pb.Attach(
        protocol_version=PROTOCOL_VERSION,
        engine_id=hello.engine_id,
        numerics_id=hello.numerics_id,
        model_digest=model.digest,
        hidden_size=model.hidden_size,
        top_k=model.top_k,
        dtype=_DTYPES[model.dtype],
    )
    if window is not None:
        attach_message.window.CopyFrom(pb.Window(name=window.name, nonce=window.nonce, size_bytes=window.size_bytes))
    stream.write(pb.ExchangeRequest(attach=attach_message).SerializeToString())
    message = stream.read(time.monotonic() + ATTACH_SECONDS)
    if message is None:
        raise LinkDown(f"{stream.address} has not answered within {ATTACH_SECONDS:.0f} s")
    reply = pb.ExchangeReply()
    try:
        reply.ParseFromString(message)
    except DecodeError as error:
        raise LinkDown(f"{stream.address} is not a worker of ours") from error
    if reply.WhichOneof("message") != "attached":
        raise LinkDown(f"{stream.address} is not a worker of ours")
    return reply.attached


class CallFailed(OSError):
    """A call to a worker ended without an answer. code: gRPC's."""

    def __init__(self, address: str, code: grpc.StatusCode, details: str) -> None:
        self.code = code
        super().__init__(with_remedy(f"{address}: {code.name}: {details}"))


class WorkerClient:
    """The other calls to one worker, each over a connection of its own. They raise CallFailed."""

    def __init__(self, address: str, trust: Trust) -> None:
        self._address = address
        self._trust = trust

    def describe(self) -> pb.DescribeReply:
        """What the worker is and holds."""
        reply: pb.DescribeReply = self._call("Describe", pb.DescribeRequest())
        return reply

    def assign(self, keys: Iterable[tuple[int, int]], *, term: int = 0, epoch: int = 0) -> Iterator[pb.AssignProgress]:
        """Load (layer, expert) pairs; one report a layer, for as long as it takes.

        A call without a report for 30 s is cancelled, and raises CallFailed of DEADLINE_EXCEEDED.
        """
        request = pb.AssignRequest(term=term, epoch=epoch, experts=_by_layer(keys))
        try:
            with self._trust.channel(self._address) as channel:
                call = experts_pb2_grpc.ExpertsStub(channel).Assign(request, metadata=self._trust.metadata)
                while (progress := self._next_report(call)) is not None:
                    yield progress
        except grpc.RpcError as error:
            raise CallFailed(self._address, error.code(), error.details()) from error

    def _next_report(self, call: Any) -> pb.AssignProgress | None:
        """None after the last one."""
        stalled = threading.Event()

        def give_up() -> None:
            stalled.set()
            call.cancel()

        timer = threading.Timer(STALL_SECONDS, give_up)
        timer.daemon = True
        timer.start()
        try:
            return next(call, None)
        except grpc.RpcError as error:
            if stalled.is_set():
                details = f"no expert was loaded within {STALL_SECONDS:g} s"
                raise CallFailed(self._address, grpc.StatusCode.DEADLINE_EXCEEDED, details) from error
            raise
        finally:
            timer.cancel()

    def release(self, keys: Iterable[tuple[int, int]], *, term: int = 0, epoch: int = 0) -> int:
        """Forget (layer, expert) pairs. Returns the bytes that the worker still holds."""
        request = pb.ReleaseRequest(term=term, epoch=epoch, experts=_by_layer(keys))
        held_bytes: int = self._call("Release", request).held_bytes
        return held_bytes

    def probe(self, layer: int, expert: int, row: torch.Tensor) -> torch.Tensor:
        """One expert's row [hidden] for one row [hidden]."""
        request = pb.ProbeRequest(layer=layer, expert=expert, row=row.contiguous().view(torch.uint8).numpy().tobytes())
        reply = self._call("Probe", request)
        return torch.frombuffer(bytearray(reply.row), dtype=row.dtype)

    def drain(self, draining: bool = True) -> None:
        """Have the worker say that it drains, or serves again."""
        self._call("Drain", pb.DrainRequest(draining=draining))

    def _call(self, method: str, request: Any) -> Any:
        try:
            with self._trust.channel(self._address) as channel:
                call = getattr(experts_pb2_grpc.ExpertsStub(channel), method)
                return call(request, metadata=self._trust.metadata, timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            raise CallFailed(self._address, error.code(), error.details()) from error


def _by_layer(keys: Iterable[tuple[int, int]]) -> list[pb.LayerExperts]:
    wanted: dict[int, list[int]] = {}
    for layer, expert in keys:
        wanted.setdefault(layer, []).append(expert)
    return [pb.LayerExperts(layer=layer, experts=sorted(experts)) for layer, experts in sorted(wanted.items())]
