"""OpenTelemetry traces: the ids by which an engine and its workers name the same span without telling each other.

Nothing travels with the rows for it. Whoever knows an engine's id, and the step, layer and attempt that every dispatch
carries anyway, derives the same ids and the same choice of the steps to record. Spans hold names, counts and times and
never experts, tokens or text, because the experts that a prompt meets reveal the prompt.

This module imports no opentelemetry; barista.tracer does, and only while traces are wanted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from barista.tracer import Tracer

TRACE_RATIO = 0.01  # of the steps, unless told otherwise
# service.name of the spans of each kind of process
ENGINE_SERVICE = "barista-engine"
WORKER_SERVICE = "barista-worker"


@dataclass(frozen=True, slots=True)
class SpanIds:
    """A span's place: its trace (16 bytes) and itself (8 bytes), as OpenTelemetry counts them."""

    trace_id: int
    span_id: int


def step_ids(engine_id: str, step: int) -> SpanIds:
    """Of one step of an engine, which is a trace of its own."""
    return SpanIds(_number(16, "step", engine_id, step), _number(8, "step", engine_id, step))


def request_ids(engine_id: str, serial: int) -> SpanIds:
    """Of the engine's request of this serial number, which is a trace of its own too."""
    return SpanIds(_number(16, "request", engine_id, serial), _number(8, "request", engine_id, serial))


def is_recorded(ids: SpanIds, ratio: float) -> bool:
    """Whether this trace is among the share `ratio` that is recorded: the rule of OpenTelemetry's TraceIdRatioBased."""
    return ids.trace_id & (2**64 - 1) < round(ratio * 2**64)


class DispatchSpans:
    """The spans of what is sent to a worker over one stream.

    The engine's end and the worker's each have one and ask it once for each dispatch, in the order of the stream, so
    that both number the parts of a large dispatch alike.
    """

    def __init__(self, engine_id: str, worker: str, ratio: float) -> None:
        self._engine_id = engine_id
        self._worker = worker
        self._ratio = ratio
        self._step = -1
        self._ids: SpanIds | None = None
        self._parts: Counter[tuple[int, int]] = Counter()

    def next(self, step: int, layer: int, attempt: int) -> SpanIds | None:
        """The ids of the next dispatch; None if its step is not recorded."""
        if step != self._step:
            ids = step_ids(self._engine_id, step)
            self._step, self._ids = step, ids if is_recorded(ids, self._ratio) else None
            self._parts.clear()
        if self._ids is None:
            return None
        part = self._parts[layer, attempt]
        self._parts[layer, attempt] += 1
        span_id = _number(8, "dispatch", self._engine_id, step, layer, attempt, self._worker, part)
        return SpanIds(self._ids.trace_id, span_id)


def compute_ids(dispatch: SpanIds) -> SpanIds:
    """Of a worker's computation of a dispatch."""
    return SpanIds(dispatch.trace_id, _number(8, "compute", dispatch.span_id))


def open_tracer(trace_to: str | None, ratio: float, service: str, instance: str) -> Tracer | None:
    """What records this process's spans; None while no traces are wanted. Raises ConfigError as barista.tracer.Tracer.

    trace_to: an OTLP/HTTP endpoint or a file. ratio: share of the steps to record. service: what kind of process this
    is. instance: which one.
    """
    if trace_to is None:
        return None
    from barista.tracer import Tracer  # imported here, because most servers do without

    return Tracer(trace_to, ratio, service, instance)


def check_target(trace_to: str) -> None:
    """Raise ConfigError if traces cannot go there from this process."""
    from barista.tracer import span_exporter  # as above

    span_exporter(trace_to).shutdown()


def _number(size: int, *parts: str | int) -> int:
    """An integer of `size` bytes that depends on all parts."""
    return int.from_bytes(blake2b("\0".join(map(str, parts)).encode(), digest_size=size).digest(), "big")
