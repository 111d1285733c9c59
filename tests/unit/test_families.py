"""Every family's logits equal transformers' in float32: prefill, decode through the paged cache, alone and mixed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experts.checkpoint import open_checkpoint
from router.model.load import load_model
from tests import tiny
from tests.forced import FORCED, PROMPTS, logits_of

TOLERANCE = 1e-4


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture(scope="module", params=sorted(tiny.FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    directory: Path = tmp_path_factory.mktemp(request.param)
    theirs = tiny.make(request.param, directory)
    return load_model(open_checkpoint(directory), torch.float32), theirs


def expected(theirs: torch.nn.Module, prompt: list[int], forced: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits = theirs(torch.tensor([prompt + forced])).logits[0]
    return logits[len(prompt) - 1 :]


@pytest.mark.parametrize("max_tokens_per_step", [8, 512])
def test_logits_equal_transformers_alone(pair, max_tokens_per_step: int) -> None:
    model, theirs = pair
    (ours,) = logits_of(model, PROMPTS[:1], FORCED[:1], max_tokens_per_step)
    assert relative(ours, expected(theirs, PROMPTS[0], FORCED[0])) < TOLERANCE


@pytest.mark.parametrize("max_tokens_per_step", [9, 512])
def test_logits_equal_transformers_in_a_mixed_batch(pair, max_tokens_per_step: int) -> None:
    model, theirs = pair
    mixed = logits_of(model, PROMPTS, FORCED, max_tokens_per_step)
    for ours, prompt, forced in zip(mixed, PROMPTS, FORCED, strict=True):
        assert relative(ours, expected(theirs, prompt, forced)) < TOLERANCE


def test_logits_are_the_same_bytes_in_any_company(pair) -> None:
    model, _ = pair
    mixed = logits_of(model, PROMPTS, FORCED, 9)
    for i in range(len(PROMPTS)):
        (alone,) = logits_of(model, PROMPTS[i : i + 1], FORCED[i : i + 1], 512)
        assert torch.equal(alone, mixed[i])
