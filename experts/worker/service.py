"""The calls that a worker answers: proto/barista/v1/experts.proto, whose comments say what each one means."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import torch

from barista.errors import CheckpointError
from barista.protocol import PROTOCOL_VERSION
from barista.v1 import experts_pb2 as pb
from experts import kernels
from experts.health.watch import GpuWatch
from experts.health.wire import report_message
from experts.link import RowsStatus
from experts.numerics import numerics_id
from experts.transport.grpc import MalformedMessage, RowsServer
from experts.transport.shm import Observe, serve_window
from experts.transport.window import Window, WindowRefused, open_window
from experts.worker.store import Computed, ExpertStore, Fenced, Held, NoRoom

if TYPE_CHECKING:
    from barista.tracer import Tracer

log = logging.getLogger(__name__)

ROW_DTYPES = {torch.float32: pb.ROW_DTYPE_FLOAT32, torch.bfloat16: pb.ROW_DTYPE_BFLOAT16}
MAX_ENGINES = 32  # each occupies a thread; the server has twice as many


class ExpertsService:
    """One worker's answers. on_drain: told whether the worker drains from now on.

    tracer: None without traces. gpus: None where no GPU is watched.
    """

    def __init__(
        self,
        store: ExpertStore,
        name: str,
        on_drain: Callable[[bool], None],
        tracer: Tracer | None = None,
        gpus: GpuWatch | None = None,
    ) -> None:
        self._store = store
        self._name = name
        self._on_drain = on_drain
        self._tracer = tracer
        self._gpus = gpus
        self._incarnation = uuid.uuid4().hex
        self._numerics_id = numerics_id(store.dtype, store.model.format)
        self._draining = False
        self._dispatches = 0
        self._counting = threading.Lock()
        self._described: tuple[tuple[Held, ...], pb.DescribeReply] = (), pb.DescribeReply()
        self._engines = threading.BoundedSemaphore(MAX_ENGINES)

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """By method. Exchange takes and gives serialised messages, which experts.transport.grpc understands."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        return {
            "Describe": unary(self.describe, pb.DescribeRequest.FromString, pb.DescribeReply.SerializeToString),
            "Assign": stream(self.assign, pb.AssignRequest.FromString, pb.AssignProgress.SerializeToString),
            "Release": unary(self.release, pb.ReleaseRequest.FromString, pb.ReleaseReply.SerializeToString),
            "Exchange": grpc.stream_stream_rpc_method_handler(self.exchange),
            "Probe": unary(self.probe, pb.ProbeRequest.FromString, pb.ProbeReply.SerializeToString),
            "Drain": unary(self.drain, pb.DrainRequest.FromString, pb.DrainReply.SerializeToString),
        }

    def describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        """What the worker is and holds."""
        store = self._store
        reply = pb.DescribeReply(
            protocol_version=PROTOCOL_VERSION,
            name=self._name,
            pid=os.getpid(),
            incarnation=self._incarnation,
            numerics_id=self._numerics_id,
            model_digest=store.model_digest,
            capacity_bytes=store.capacity_bytes,
            held_bytes=store.held_bytes,
            draining=self._draining,
            dispatches=self._dispatches + (self._store.tables.served if self._store.tables else 0),
            term=store.term,
            epoch=store.epoch,
            health=None if self._gpus is None else report_message(self._gpus.report),
        )
        reply.MergeFrom(self._held_reply())
        return reply

    def assign(self, request: pb.AssignRequest, context: grpc.ServicerContext) -> Iterator[pb.AssignProgress]:
        """Load experts and say so, layer by layer."""
        try:
            for progress in self._store.assign(_by_layer(request.experts), request.term, request.epoch):
                yield pb.AssignProgress(
                    bytes_done=progress.bytes_done, bytes_total=progress.bytes_total, loaded=_held(progress.loaded)
                )
        except (Fenced, NoRoom, CheckpointError, ValueError) as error:
            _refuse(context, error)

    def release(self, request: pb.ReleaseRequest, context: grpc.ServicerContext) -> pb.ReleaseReply:
        """Forget experts."""
        try:
            self._store.release(_by_layer(request.experts), request.term, request.epoch)
        except (Fenced, ValueError) as error:
            _refuse(context, error)
        return pb.ReleaseReply(held_bytes=self._store.held_bytes)

    def probe(self, request: pb.ProbeRequest, context: grpc.ServicerContext) -> pb.ProbeReply:
        """One expert's row."""
        dtype, hidden_size = self._store.dtype, self._store.model.hidden_size
        if len(request.row) != hidden_size * dtype.itemsize:
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"A row of {len(request.row)} bytes; {hidden_size} values of {dtype} are wanted.",
            )
        row = torch.frombuffer(bytearray(request.row), dtype=dtype).view(1, hidden_size)
        out = torch.empty_like(row)
        try:
            computed = self._store.compute(request.layer, row, torch.tensor([[request.expert]], dtype=torch.int32), out)
        except ValueError as error:
            _refuse(context, error)
        if computed.status is RowsStatus.NOT_HELD:
            context.abort(grpc.StatusCode.NOT_FOUND, "The expert is not held here.")
        return pb.ProbeReply(row=out.view(torch.uint8).numpy().tobytes())

    def drain(self, request: pb.DrainRequest, context: grpc.ServicerContext) -> pb.DrainReply:
        """Drain, or serve again."""
        self._draining = request.draining
        self._on_drain(request.draining)
        return pb.DrainReply()

    def exchange(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """One engine's rows until it goes. Nothing of it is left behind then."""
        if not self._engines.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_ENGINES} engines are attached already.")
        try:
            yield from self._serve_engine(requests, context)
        except grpc.RpcError:
            return  # the engine has gone
        except MalformedMessage as error:
            log.warning("an engine sent what the protocol does not allow; its stream is ended")
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"Malformed message: {error}.")
        finally:
            self._engines.release()

    def _held_reply(self) -> pb.DescribeReply:
        """What is held, made into messages once: they are many, are asked for often, and change seldom."""
        held, reply = self._described
        if held is not self._store.held():
            held = self._store.held()
            reply = pb.DescribeReply(held=_held(held))
            self._described = held, reply
        return reply

    def _serve_engine(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        attach = _parse_attach(next(requests, b""))
        if refusal := self._refusal(attach):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        window, window_refusal = _window(attach)
        yield pb.ExchangeReply(
            attached=pb.Attached(
                window_accepted=window is not None, window_refusal=window_refusal, epoch=self._store.epoch
            )
        ).SerializeToString()
        observe = self._observer(attach.engine_id)
        if window is None:
            rows = RowsServer(attach.hidden_size, attach.top_k, self._store.dtype, self._compute, observe)
            yield from map(rows.answer, requests)
        else:
            _serve_window(window, self._compute, context, observe, self._store.tables)

    def _observer(self, engine_id: str) -> Observe | None:
        """What records the computations of one stream of an engine."""
        if self._tracer is None:
            return None
        from experts.transport.traced import compute_observer  # imported here, because most workers do without

        return compute_observer(self._tracer, engine_id, self._name)

    def _refusal(self, attach: pb.Attach) -> str:
        """Why this engine cannot be served, and what would help; empty if it can."""
        model = self._store.model
        same_barista = "Run the same Barista on the router's and the worker's host."
        checks = (
            ("protocol version", attach.protocol_version, PROTOCOL_VERSION, same_barista),
            (
                "numerics id",
                attach.numerics_id,
                self._numerics_id,
                f"{same_barista} Both need the same instruction set and the same torch.",
            ),
            (
                "checkpoint's digest",
                attach.model_digest.hex(),
                self._store.model_digest.hex(),
                f"Copy the router's checkpoint to {model.path} on the worker's host.",
            ),
            ("hidden size", attach.hidden_size, model.hidden_size, "Start the pool for this model."),
            ("experts a token", attach.top_k, model.top_k, "Start the pool for this model."),
            ("row dtype", attach.dtype, ROW_DTYPES[self._store.dtype], "Start the pool with the router's --format."),
        )
        for what, theirs, ours, remedy in checks:
            if theirs != ours:
                return f"The router's {what} is {theirs}, that of {self._name} is {ours}. {remedy}"
        return ""

    def _compute(self, layer: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor, out: torch.Tensor) -> Computed:
        try:
            return self._store.compute(layer, hidden_states, topk_ids, out)
        except ValueError:  # what was asked for makes no sense
            raise
        except Exception:
            log.exception("the experts of layer %d could not be computed", layer)
            return Computed(RowsStatus.FAILED, self._store.epoch)
        finally:
            with self._counting:
                self._dispatches += 1


def _serve_window(
    window: Window,
    compute: Any,
    context: grpc.ServicerContext,
    observe: Observe | None,
    tables: kernels.LayerTables | None,
) -> None:
    """Serve until the stream ends, in whatever way, or the engine closes the window."""
    if not context.add_callback(window.close):
        window.close()
    try:
        serve_window(window, compute, observe, tables)
    finally:
        window.close()


def _window(attach: pb.Attach) -> tuple[Window | None, str]:
    """The window that the engine offers, or why there is none."""
    if not attach.HasField("window"):
        return None, ""
    offer = attach.window
    try:
        window = open_window(offer.name, offer.nonce, offer.size_bytes)
    except WindowRefused as error:
        return None, str(error)
    if (window.hidden_size, window.top_k, ROW_DTYPES[window.dtype]) != (attach.hidden_size, attach.top_k, attach.dtype):
        return None, "the window is of another shape than the rows"
    return window, ""


def _parse_attach(message: bytes) -> pb.Attach:
    request = pb.ExchangeRequest()
    try:
        request.ParseFromString(message)
    except ValueError as error:  # DecodeError is one
        raise MalformedMessage("not a message of this protocol") from error
    if request.WhichOneof("message") != "attach":
        raise MalformedMessage("the first message is not attach")
    return request.attach


def _by_layer(experts: Iterable[pb.LayerExperts]) -> dict[int, set[int]]:
    wanted: dict[int, set[int]] = {}
    for entry in experts:
        wanted.setdefault(entry.layer, set()).update(entry.experts)
    return wanted


def _held(held: Iterable[Held]) -> list[pb.HeldExpert]:
    return [pb.HeldExpert(layer=item.layer, expert=item.expert, digest=item.digest) for item in held]


def _refuse(context: grpc.ServicerContext, error: Exception) -> NoReturn:
    codes = {
        Fenced: grpc.StatusCode.FAILED_PRECONDITION,
        NoRoom: grpc.StatusCode.RESOURCE_EXHAUSTED,
        CheckpointError: grpc.StatusCode.DATA_LOSS,
    }
    context.abort(codes.get(type(error), grpc.StatusCode.INVALID_ARGUMENT), str(error))
    raise AssertionError("abort returned")
