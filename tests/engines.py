"""An engine on a tiny checkpoint, without a process around it."""

from __future__ import annotations

from collections.abc import Iterable

from router.engine.core import Engine
from router.kv_cache.blocks import BlockPool
from router.messages import SamplingParams, StepEvents, Submit
from router.model.load import Model
from router.scheduler import Scheduler


def engine_on(
    model: Model,
    *,
    blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 64,
    eos: Iterable[int] = (),
) -> Engine:
    scheduler = Scheduler(
        BlockPool(blocks, block_size),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=min(256, blocks * block_size),
        eos_token_ids=tuple(eos),
    )
    return Engine(model, scheduler)


class Recorder:
    """Collects what each request was answered."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[float | None]] = {}
        self.finished: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def record(self, events: StepEvents) -> None:
        for token in events.tokens:
            answer = self.tokens.setdefault(token.request_id, [])
            assert token.index == len(answer)
            assert token.request_id not in self.finished
            answer.append(token.token_id)
            self.logprobs.setdefault(token.request_id, []).append(token.logprob)
            if token.finish_reason is not None:
                self.finished[token.request_id] = token.finish_reason
        for failure in events.failed:
            assert failure.request_id not in self.failed
            self.failed[failure.request_id] = failure.code


def answer(engine: Engine, requests: Iterable[Submit]) -> Recorder:
    """Submit all, then step until all is done."""
    recorder = Recorder()
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        recorder.record(engine.step())
    return recorder


def request(name: str, prompt: Iterable[int], **sampling: object) -> Submit:
    return Submit(name, tuple(prompt), SamplingParams(**sampling))  # type: ignore[arg-type]
