"""The spans of an engine: one for every request, and one for each recorded step, which links to its requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from barista.tracer import Tracer
from barista.tracing import SpanIds, is_recorded, request_ids, step_ids
from router.messages import StepEvents
from router.scheduler import StepPlan


@dataclass(slots=True)
class _Open:
    """A request under way. started: of the clock."""

    ids: SpanIds
    started: float
    num_prompt_tokens: int
    num_generated_tokens: int = 0


class EngineTraces:
    """Told by the engine what happens, between its steps. engine_id: as the workers know it."""

    def __init__(self, tracer: Tracer, engine_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._tracer = tracer
        self._engine_id = engine_id
        self._clock = clock
        self._open: dict[str, _Open] = {}
        self._serial = 0

    def submitted(self, request_id: str, num_prompt_tokens: int) -> None:
        """A request has come."""
        self._serial += 1
        ids = request_ids(self._engine_id, self._serial)
        self._open[request_id] = _Open(ids, self._clock(), num_prompt_tokens)

    def aborted(self, request_ids: Iterable[str]) -> None:
        """Nobody wants these any more. Those that have ended are ignored."""
        for request_id in request_ids:
            self._end(request_id, "aborted")

    def stepped(self, step: int, seconds: float, plan: StepPlan, events: StepEvents) -> None:
        """A step has ended just now, `seconds` after its start. plan: without chunks, nothing was computed."""
        if plan.chunks:
            self._record_step(step, seconds, plan)
        for token in events.tokens:
            if (request := self._open.get(token.request_id)) is not None:
                request.num_generated_tokens += 1
            if token.finish_reason is not None:
                self._end(token.request_id, token.finish_reason)
        for failed in events.failed:
            self._end(failed.request_id, failed.code, error=failed.code)

    def flush(self) -> None:
        """Export what there is, because the process ends."""
        self.aborted(list(self._open))
        self._tracer.flush()

    def _record_step(self, step: int, seconds: float, plan: StepPlan) -> None:
        ids = step_ids(self._engine_id, step)
        if not is_recorded(ids, self._tracer.ratio):
            return
        now = self._clock()
        requests = [self._open.get(chunk.sequence.request_id) for chunk in plan.chunks]
        attributes: dict[str, str | int | bool] = {
            "barista.step": step,
            "barista.tokens": plan.num_tokens,
            "barista.sequences": len(plan.chunks),
        }
        links = [request.ids for request in requests if request is not None]
        self._tracer.record("step", ids, now - seconds, now, attributes, links=links)

    def _end(self, request_id: str, reason: str, error: str = "") -> None:
        request = self._open.pop(request_id, None)
        if request is None:
            return
        attributes: dict[str, str | int | bool] = {
            "barista.request_id": request_id,
            "barista.prompt_tokens": request.num_prompt_tokens,
            "barista.generated_tokens": request.num_generated_tokens,
            "barista.finish_reason": reason,
        }
        self._tracer.record(
            "request", request.ids, request.started, self._clock(), attributes, kind="server", error=error
        )
