"""Every family's logits equal transformers' in float32: prefill, decode through the paged cache, alone and mixed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experts.checkpoint import open_checkpoint
from router.engine.core import make_batch
from router.kv_cache.blocks import BlockPool
from router.kv_cache.storage import allocate_cache
from router.messages import SamplingParams
from router.model.load import Model, load_model
from router.request import Sequence
from router.scheduler import Scheduler
from tests import tiny

TOLERANCE = 1e-4
BLOCK = 4


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def run(
    model: Model, prompts: list[list[int]], forced: list[list[int]], max_tokens_per_step: int
) -> list[torch.Tensor]:
    """Logits [len(forced) + 1, vocab] of each sequence: after its prompt, then after each forced token."""
    pool = BlockPool(64, BLOCK)
    scheduler = Scheduler(
        pool, max_num_seqs=8, max_num_batched_tokens=max_tokens_per_step, max_model_len=256,
    )  # fmt: skip
    cache = allocate_cache(model.spec, pool.num_blocks, BLOCK, model.dtype)
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


@pytest.fixture(scope="module", params=sorted(tiny.FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    directory: Path = tmp_path_factory.mktemp(request.param)
    theirs = tiny.make(request.param, directory)
    return load_model(open_checkpoint(directory), torch.float32), theirs


PROMPTS = [[3, 17, 90, 41, 5, 77, 23, 8, 64, 110, 12], [9, 8, 7], [100], [30 + i for i in range(29)]]
FORCED = [[50, 60, 70, 80], [11, 12], [13, 14, 15, 16, 17], [2]]


def expected(theirs: torch.nn.Module, prompt: list[int], forced: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits = theirs(torch.tensor([prompt + forced])).logits[0]
    return logits[len(prompt) - 1 :]


@pytest.mark.parametrize("max_tokens_per_step", [8, 512])
def test_logits_equal_transformers_alone(pair, max_tokens_per_step: int) -> None:
    model, theirs = pair
    (ours,) = run(model, PROMPTS[:1], FORCED[:1], max_tokens_per_step)
    assert relative(ours, expected(theirs, PROMPTS[0], FORCED[0])) < TOLERANCE


@pytest.mark.parametrize("max_tokens_per_step", [9, 512])
def test_logits_equal_transformers_in_a_mixed_batch(pair, max_tokens_per_step: int) -> None:
    model, theirs = pair
    for ours, prompt, forced in zip(run(model, PROMPTS, FORCED, max_tokens_per_step), PROMPTS, FORCED, strict=True):
        assert relative(ours, expected(theirs, prompt, forced)) < TOLERANCE


def test_logits_are_the_same_bytes_in_any_company(pair) -> None:
    model, _ = pair
    mixed = run(model, PROMPTS, FORCED, 9)
    for i in range(len(PROMPTS)):
        (alone,) = run(model, PROMPTS[i : i + 1], FORCED[i : i + 1], 512)
        assert torch.equal(alone, mixed[i])
