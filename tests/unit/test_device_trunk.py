"""The device's trunk gives the logits of the CPU's kernels: every family, prefill in chunks, decode, mixed batches."""

from __future__ import annotations

import pytest
import torch

from experts.checkpoint import open_checkpoint
from router.model.load import Model, load_model
from tests import tiny
from tests.device_models import device_model, run_again
from tests.forced import FORCED, PROMPTS, logits_of


@pytest.fixture(scope="module", params=sorted(tiny.FAMILIES))
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model, Model]:
    """By the CPU's kernels, on a device, and there with its decode steps captured."""
    directory = tmp_path_factory.mktemp(request.param)
    tiny.make(request.param, directory)
    cpu = load_model(open_checkpoint(directory), torch.float32)
    return cpu, device_model(directory), device_model(directory, capture=run_again)


@pytest.mark.parametrize("captured", [False, True], ids=["by kernel", "captured"])
@pytest.mark.parametrize("max_tokens_per_step", [9, 512])
def test_logits_equal_the_cpu_kernels(
    models: tuple[Model, Model, Model], max_tokens_per_step: int, captured: bool
) -> None:
    cpu, device = models[0], models[1 + captured]
    wanted, ours = (logits_of(model, PROMPTS, FORCED, max_tokens_per_step) for model in (cpu, device))
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
