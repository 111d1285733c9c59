"""What an engine knows of its pool: the controller's word, followed over `Controller.Watch`."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import grpc

from barista.trust import Trust
from barista.v1 import controller_pb2 as pb
from barista.v1.controller_pb2_grpc import ControllerStub
from experts.health.wire import verdict_of

log = logging.getLogger(__name__)

RECONNECT_SECONDS = 0.5
REPORT_SECONDS = 1.0

REACHABLE = frozenset(
    {
        pb.WORKER_STATE_LOADING,
        pb.WORKER_STATE_READY,
        pb.WORKER_STATE_DRAINING,
        pb.WORKER_STATE_DRAINED,
    }
)


SETTLING = frozenset({pb.WORKER_STATE_STARTING, pb.WORKER_STATE_LOADING})


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker that can be attached to. incarnation: another one after each restart.

    weight: its speed, 1 as it should be, 0 for one that shall compute only what nobody else can.
    """

    name: str
    address: str
    incarnation: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class PoolView:
    """One state of the pool.

    workers: those in reach; names: all that belong to it. replicas: layer -> for each expert the names of its workers.
    settling: workers are starting or loading. coverage: 0..1, and problem: why it is not complete, in words for the
    operator.
    """

    term: int
    epoch: int
    workers: tuple[WorkerView, ...]
    names: frozenset[str]
    replicas: Mapping[int, tuple[tuple[str, ...], ...]]
    settling: bool
    coverage: float
    problem: str
    model_digest: bytes


def view_of(state: pb.PoolState) -> PoolView:
    """The message as a value."""
    return PoolView(
        term=state.term,
        epoch=state.epoch,
        workers=tuple(
            WorkerView(worker.name, worker.address, worker.incarnation, verdict_of(worker.health).weight)
            for worker in state.workers
            if worker.address and worker.state in REACHABLE
        ),
        names=frozenset(worker.name for worker in state.workers),
        replicas={layer.layer: tuple(tuple(expert.workers) for expert in layer.experts) for layer in state.layers},
        settling=any(worker.state in SETTLING for worker in state.workers),
        coverage=state.coverage,
        problem=state.problem,
        model_digest=state.model_digest,
    )


class PoolWatch:
    """Follows the controller in a thread of its own, for as long as it is open, however often the stream breaks.

    on_view is called from that thread. loads: called about once a second; tokens by expert since its last call, by
    layer. The last view stays in force while the controller is away: rows need no controller. complaint: why nothing
    is heard from it at present, if so.
    """

    def __init__(
        self,
        controller: str,
        trust: Trust,
        engine_id: str,
        on_view: Callable[[PoolView], None],
        loads: Callable[[], Mapping[int, list[int]]],
    ) -> None:
        self._controller = controller
        self._trust = trust
        self._engine_id = engine_id
        self._on_view = on_view
        self._loads = loads
        self.complaint = ""
        self._acknowledged = 0, 0  # term and epoch
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._call: grpc.Call | None = None
        self._thread = threading.Thread(target=self._follow, name="pool-watch", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def acknowledge(self, term: int, epoch: int) -> None:
        """No layer uses an older placement any more."""
        if (term, epoch) > self._acknowledged:
            self._acknowledged = term, epoch
            self._wake.put(True)

    def close(self) -> None:
        """Stop following. Idempotent."""
        self._closed.set()
        if self._call is not None:
            self._call.cancel()

    def _follow(self) -> None:
        while not self._closed.is_set():
            try:
                self._follow_once()
            except grpc.RpcError as error:
                self._complain(f"The controller at {self._controller} does not answer: {error.details()}")
            except Exception:  # a view that cannot be used; the next may be of use
                log.exception("What the controller at %s says cannot be followed.", self._controller)
            self._closed.wait(RECONNECT_SECONDS)

    def _follow_once(self) -> None:
        """Follow one stream until it ends."""
        wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._wake = wake
        try:
            with self._trust.channel(self._controller) as channel:
                call = ControllerStub(channel).Watch(self._requests(wake), metadata=self._trust.metadata)
                self._call = call
                if self._closed.is_set():  # by someone who may not have seen the call
                    call.cancel()
                for state in call:
                    if self.complaint:
                        log.info("The controller at %s answers again.", self._controller)
                    self.complaint = ""
                    self._on_view(view_of(state))
        finally:
            wake.put(False)

    def _complain(self, complaint: str) -> None:
        if not self.complaint and not self._closed.is_set():
            log.warning("%s", complaint)
        self.complaint = complaint

    def _requests(self, wake: queue.SimpleQueue[bool]) -> Iterator[pb.WatchRequest]:
        """One stream's acknowledgements as they come, and loads about once a second. False in `wake` is its end."""
        sent, reported = (-1, -1), 0.0
        going = True
        while going:
            due = time.monotonic() - reported >= REPORT_SECONDS
            if due or sent != self._acknowledged:
                sent = self._acknowledged
                request = pb.WatchRequest(engine_id=self._engine_id, term=sent[0], acknowledged_epoch=sent[1])
                if due:
                    reported = time.monotonic()
                    loads = self._loads().items()
                    request.loads.extend(pb.LayerLoad(layer=layer, tokens=tokens) for layer, tokens in loads)
                yield request
            with suppress(queue.Empty):
                going = wake.get(timeout=REPORT_SECONDS)
