"""The engine: scheduler, model, cache and sampler, one step at a time. No sockets, no threads."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from barista.errors import InvalidRequest, RequestError
from experts.expert_parallel.group_pool import GroupPool
from experts.expert_parallel.pool import NoWorkers
from experts.pool import ExpertPool
from experts.residency import Residency
from router.engine.pool_stats import pool_stats
from router.messages import ExpertCacheStats, Failed, ModelInfo, Stats, StepEvents, Submit, Token
from router.model.batch import Batch
from router.model.load import Model
from router.request import Sequence, Status
from router.sampler import Drawn, sample
from router.scheduler import ScheduledChunk, Scheduler, StepPlan

if TYPE_CHECKING:
    from router.engine.traces import EngineTraces

log = logging.getLogger(__name__)

NONFINITE = "The model gave values that are not finite for this request."
UNAVAILABLE = "No worker in reach could compute an expert that this request needs."
INTERNAL = "The engine failed in a step of this request."
# Steps in a row that may fail before the engine gives up: one may be a request's fault or a moment without memory.
MAX_FAILED_STEPS = 3


class Engine:
    """Call submit and abort at any time between steps, and step while has_work.

    A request that cannot run, or whose rows fail, ends with a Failed event; no other is disturbed.
    traces: None while none are wanted.
    """

    def __init__(self, model: Model, scheduler: Scheduler, traces: EngineTraces | None = None) -> None:
        self._model = model
        self._scheduler = scheduler
        self._traces = traces
        pool = scheduler.pool
        self._block_size = pool.block_size
        self._cache = model.trunk.allocate_cache(pool.num_blocks, pool.block_size)
        self._failed: list[Failed] = []
        self._steps = 0
        self._step_seconds = 0.0
        self._iteration_tokens = 0
        self._failed_steps = 0

    @property
    def has_work(self) -> bool:
        """True while a step would do or report something."""
        return self._scheduler.has_work or bool(self._failed)

    def submit(self, request: Submit) -> None:
        """Queue a request. What cannot run is reported by the next step."""
        if self._traces is not None:
            self._traces.submitted(request.request_id, len(request.prompt_token_ids))
        sequence = Sequence(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling=request.sampling,
            salt=request.salt,
            output_token_ids=list(request.drawn_token_ids),
        )
        try:
            self._check_ids(request)
            self._scheduler.add(sequence)
        except RequestError as error:
            self._failed.append(Failed(request.request_id, error.code or "invalid_request", str(error)))

    def abort(self, request_ids: tuple[str, ...]) -> None:
        """Forget these requests and free their blocks now."""
        for request_id in request_ids:
            self._scheduler.abort(request_id)
        if self._traces is not None:
            self._traces.aborted(request_ids)

    @torch.inference_mode()
    def step(self) -> StepEvents:
        """Compute one step and report what it produced."""
        started, step = time.perf_counter(), self._steps
        plan = self._scheduler.schedule()
        tokens: tuple[Token, ...] = ()
        if plan.chunks:
            tokens = self._guarded(plan)
            self._steps += 1
            self._step_seconds += time.perf_counter() - started
            self._iteration_tokens += plan.num_tokens
        failed, self._failed = tuple(self._failed), []
        events = StepEvents(tokens, failed)
        if self._traces is not None:
            self._traces.stepped(step, time.perf_counter() - started, plan, events)
        return events

    def stats(self) -> Stats:
        """Counters and gauges of now."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        experts = self._model.pool
        return Stats(
            num_requests_running=len(scheduler.running),
            num_requests_waiting=len(scheduler.waiting),
            kv_blocks_total=pool.num_blocks,
            kv_blocks_used=pool.num_used,
            prefix_cache_queries=pool.queries,
            prefix_cache_hits=pool.hits,
            num_preemptions=scheduler.num_preemptions,
            steps=self._steps,
            step_seconds=self._step_seconds,
            iteration_tokens=self._iteration_tokens,
            **_group_stats(experts),
            expert_tokens=() if experts is None else tuple(map(tuple, experts.expert_tokens.tolist())),
            pool=None if self._model.remote is None else pool_stats(self._model.remote),
            expert_cache=_expert_cache_stats(self._model.residency),
        )

    def _check_ids(self, request: Submit) -> None:
        vocab = self._model.spec.vocab_size
        given = (*request.prompt_token_ids, *request.drawn_token_ids, *request.sampling.logit_bias)
        bad = next((i for i in given if not 0 <= i < vocab), None)
        if bad is not None:
            raise InvalidRequest(f"token id {bad} is outside the vocabulary of {vocab}", code="invalid_request")

    def _guarded(self, plan: StepPlan) -> tuple[Token, ...]:
        """Compute a step. If that raises, its requests fail and the others go on; raises when it keeps happening."""
        try:
            tokens = self._compute(plan)
        except Exception as error:
            self._failed_steps += 1
            if self._failed_steps >= MAX_FAILED_STEPS or isinstance(error, NoWorkers):
                raise
            log.exception("A step of %d tokens failed; its %d requests end.", plan.num_tokens, len(plan.chunks))
            for chunk in plan.chunks:
                self._scheduler.abort(chunk.sequence.request_id)
                self._failed.append(Failed(chunk.sequence.request_id, "internal", INTERNAL))
            return ()
        self._failed_steps = 0
        return tokens

    def _compute(self, plan: StepPlan) -> tuple[Token, ...]:
        logits, failed = self._model.trunk.forward(make_batch(plan, self._block_size), self._cache, self._steps)
        sampled = plan.sampled
        drawn = sample(logits, sampled) if sampled else []
        self._abort_failed(plan, failed)
        self._scheduler.update(plan, [None if draw is None else draw.token_id for draw in drawn])
        events = []
        for sequence, draw in zip(sampled, drawn, strict=True):
            if sequence.status is Status.FAILED:
                self._failed.append(Failed(sequence.request_id, "nonfinite", NONFINITE))
            elif draw is not None and sequence.status is not Status.ABORTED:
                events.append(_token_event(sequence, draw))
        return tuple(events)

    def _abort_failed(self, plan: StepPlan, failed: torch.Tensor) -> None:
        """End the requests with a row that the experts could not answer, before any of it is recorded or cached."""
        if not failed.any():
            return
        remote = self._model.remote
        lost = None if remote is None else remote.group.unavailable(self._steps)
        unavailable = torch.zeros_like(failed) if lost is None else lost
        lengths = [chunk.num_tokens for chunk in plan.chunks]
        of_chunk = zip(plan.chunks, torch.split(failed, lengths), torch.split(unavailable, lengths), strict=True)
        for chunk, rows, lacking in of_chunk:
            if rows.any():
                code, message = ("expert_unavailable", UNAVAILABLE) if lacking.any() else ("nonfinite", NONFINITE)
                self._scheduler.abort(chunk.sequence.request_id)
                self._failed.append(Failed(chunk.sequence.request_id, code, message))


def _group_stats(experts: ExpertPool | None) -> dict[str, int]:
    """What only an engine with workers of its own on GPUs has to tell."""
    if not isinstance(experts, GroupPool):
        return {}
    return {
        "group_workers": len(experts.worker_pids),
        "group_workers_lost": experts.workers_lost,
        "recomputed_steps": experts.recomputed_steps,
    }


def _expert_cache_stats(residency: Residency | None) -> ExpertCacheStats | None:
    if residency is None:
        return None
    return ExpertCacheStats(residency.queries, residency.hits, residency.resident_bytes)


def make_batch(plan: StepPlan, block_size: int) -> Batch:
    """The step's flat tensors."""
    token_ids: list[int] = []
    positions: list[int] = []
    seq_ids: list[int] = []
    slots: list[int] = []
    sample_rows: list[int] = []
    for seq_id, chunk in enumerate(plan.chunks):
        table = chunk.sequence.block_table
        span = range(chunk.start, chunk.start + chunk.num_tokens)
        token_ids += chunk.token_ids
        positions += span
        seq_ids += [seq_id] * chunk.num_tokens
        slots += [table[p // block_size] * block_size + p % block_size for p in span]
        if chunk.samples:
            sample_rows.append(len(token_ids) - 1)
    return Batch(
        token_ids=_tensor(token_ids),
        positions=_tensor(positions),
        seq_ids=_tensor(seq_ids),
        slots=_tensor(slots),
        block_tables=_block_tables(plan.chunks),
        sample_rows=_tensor(sample_rows, np.int64),
    )


def _block_tables(chunks: tuple[ScheduledChunk, ...]) -> torch.Tensor:
    width = max(len(chunk.sequence.block_table) for chunk in chunks)
    rows = [chunk.sequence.block_table + [0] * (width - len(chunk.sequence.block_table)) for chunk in chunks]
    return _tensor(rows)


def _tensor(numbers: list[int] | list[list[int]], dtype: type[np.integer[Any]] = np.int32) -> torch.Tensor:
    """By way of numpy, which takes a third of torch.tensor's time."""
    return torch.from_numpy(np.array(numbers, dtype=dtype))


def _token_event(sequence: Sequence, draw: Drawn) -> Token:
    finished = sequence.status is Status.FINISHED
    return Token(
        request_id=sequence.request_id,
        index=len(sequence.output_token_ids) - 1,
        token_id=draw.token_id,
        finish_reason=sequence.finish_reason if finished else None,
        logprob=draw.logprob,
        top_logprobs=draw.top_logprobs,
        num_cached_tokens=sequence.num_cached_tokens,
    )


def kv_blocks(model: Model, block_size: int, tokens: int | None, size: int | None, default: int) -> int:
    """How many blocks to hold. tokens, size (bytes): what was asked for; default: bytes where nothing was."""
    if tokens is None:
        tokens = (default if size is None else size) // kv_bytes_per_token(model)
    return max(1, tokens // block_size)


def default_kv_bytes(model: Model, free: int) -> int:
    """The KV cache in the machine's memory that nobody gave a size. free: bytes available.

    1 GiB or one sequence of full length, whichever is more, and never over half of what is free.
    """
    return min(max(2**30, model.trunk.max_len * kv_bytes_per_token(model)), free // 2)


def kv_bytes_per_token(model: Model) -> int:
    """Bytes of cache for one token over all layers."""
    return model.spec.kv_values_per_token * model.dtype.itemsize


def model_info(model: Model, scheduler: Scheduler, numerics_id: str) -> ModelInfo:
    """What the API is told when the engine is ready."""
    capacity = scheduler.pool.num_blocks * scheduler.pool.block_size
    return ModelInfo(
        vocab_size=model.spec.vocab_size,
        max_model_len=scheduler.max_model_len,
        kv_capacity_tokens=capacity,
        kv_bytes_per_token=kv_bytes_per_token(model),
        eos_token_ids=tuple(sorted(scheduler.eos_token_ids)),
        dtype=str(model.dtype).removeprefix("torch."),
        num_layers=model.spec.num_layers,
        num_experts=model.spec.num_experts,
        numerics_id=numerics_id,
    )
