"""A model through schedule and cache with tokens that are given, not drawn, so that logits can be compared."""

from __future__ import annotations

import torch

from router.engine.core import make_batch
from router.kv_cache.blocks import BlockPool
from router.messages import SamplingParams
from router.model.load import Model
from router.request import Sequence
from router.scheduler import Scheduler

BLOCK = 4
PROMPTS = [[3, 17, 90, 41, 5, 77, 23, 8, 64, 110, 12], [9, 8, 7], [100], [30 + i for i in range(29)]]
FORCED = [[50, 60, 70, 80], [11, 12], [13, 14, 15, 16, 17], [2]]


def logits_of(
    model: Model, prompts: list[list[int]], forced: list[list[int]], max_tokens_per_step: int
) -> list[torch.Tensor]:
    """Logits [len(forced) + 1, vocab] of each sequence: after its prompt, then after each forced token."""
    pool = BlockPool(64, BLOCK)
    scheduler = Scheduler(pool, max_num_seqs=8, max_num_batched_tokens=max_tokens_per_step, max_model_len=256)
    cache = model.trunk.allocate_cache(pool.num_blocks, BLOCK)
    sequences = [
        Sequence(request_id=str(i), prompt_token_ids=tuple(p), sampling=SamplingParams(max_tokens=len(forced[i]) + 1))
        for i, p in enumerate(prompts)
    ]
    rows: dict[str, list[torch.Tensor]] = {s.request_id: [] for s in sequences}
    for sequence in sequences:
        scheduler.add(sequence)
    step = 0
    while scheduler.has_work:
        plan = scheduler.schedule()
        with torch.inference_mode():
            logits, failed = model.trunk.forward(make_batch(plan, BLOCK), cache, step)
        assert not failed.any()
        drawn = []
        for sequence, row in zip(plan.sampled, logits, strict=True):
            rows[sequence.request_id].append(row)
            tokens = forced[int(sequence.request_id)]
            drawn.append(tokens[len(sequence.output_token_ids)] if len(sequence.output_token_ids) < len(tokens) else 5)
        scheduler.update(plan, drawn)
        step += 1
    return [torch.stack(rows[s.request_id]) for s in sequences]
