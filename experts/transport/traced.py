"""Traces of the rows on a wire, at both its ends: the engine's dispatch, and below it what the worker computed."""

from __future__ import annotations

import time
from collections import deque

from barista.tracer import Tracer
from barista.tracing import DispatchSpans, SpanIds, compute_ids, step_ids
from experts.link import Link, LinkDown, RowsReply, RowsRequest
from experts.transport.shm import Observe


class TracedLink:
    """An experts.link.Link that records a span for each dispatch of a recorded step, from its sending to its answer."""

    def __init__(self, link: Link, tracer: Tracer, engine_id: str, worker: str) -> None:
        self.transport, self.max_rows, self.depth = link.transport, link.max_rows, link.depth
        self.counters = link.counters
        self._link = link
        self._tracer = tracer
        self._engine_id = engine_id
        self._worker = worker
        self._spans = DispatchSpans(engine_id, worker, tracer.ratio)
        self._sent: deque[tuple[SpanIds | None, float, RowsRequest]] = deque()  # without an answer, in order

    @property
    def down(self) -> bool:
        """As Link."""
        return self._link.down

    @property
    def outstanding(self) -> int:
        """As Link."""
        return self._link.outstanding

    def send(self, request: RowsRequest) -> None:
        """As Link."""
        started = time.monotonic()
        try:
            self._link.send(request)
        except LinkDown:
            self._lose()
            raise
        self._sent.append((self._spans.next(request.step, request.layer, request.attempt), started, request))

    def receive(self, deadline: float) -> RowsReply | None:
        """As Link."""
        try:
            reply = self._link.receive(deadline)
        except LinkDown:
            self._lose()
            raise
        if reply is not None:
            self._record("" if reply.status.name == "OK" else reply.status.name)
        return reply

    def close(self) -> None:
        """As Link."""
        self._link.close()

    def _lose(self) -> None:
        while self._sent:
            self._record("the link went down")

    def _record(self, error: str) -> None:
        ids, started, request = self._sent.popleft()
        if ids is None:
            return
        attributes: dict[str, str | int | bool] = {
            "barista.worker": self._worker,
            "barista.transport": self.transport,
            "barista.step": request.step,
            "barista.layer": request.layer,
            "barista.attempt": request.attempt,
            "barista.resend": request.attempt > 0,  # or a hedge: both ask another replica for the same rows
            "barista.pairs": request.num_pairs,
        }
        parent = step_ids(self._engine_id, request.step)
        self._tracer.record(
            "dispatch", ids, started, time.monotonic(), attributes, parent=parent, kind="client", error=error
        )


def compute_observer(tracer: Tracer, engine_id: str, worker: str) -> Observe:
    """For the worker's end of one stream: records what it computed, below the engine's span of the dispatch."""
    spans = DispatchSpans(engine_id, worker, tracer.ratio)

    def observe(step: int, layer: int, attempt: int, num_pairs: int, compute_nanoseconds: int) -> None:
        dispatch = spans.next(step, layer, attempt)
        if dispatch is None:
            return
        now = time.monotonic()
        attributes: dict[str, str | int | bool] = {
            "barista.worker": worker,
            "barista.step": step,
            "barista.layer": layer,
            "barista.attempt": attempt,
            "barista.pairs": num_pairs,
        }
        started = now - compute_nanoseconds * 1e-9
        tracer.record("compute", compute_ids(dispatch), started, now, attributes, parent=dispatch, kind="server")

    return observe
