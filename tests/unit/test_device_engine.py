"""An engine whose model is on a device answers what the CPU's engine answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experts.checkpoint import open_checkpoint
from router.model.load import load_model
from tests import tiny
from tests.device_models import device_model, run_again
from tests.engines import answer, engine_on, request

SUBMITS = [
    *(request(f"greedy {i}", [10 + i, 4, 5, 6], max_tokens=14, temperature=0) for i in range(4)),
    request("long", range(3, 33), max_tokens=6, temperature=0),
    request("drawn", [7, 8, 9], max_tokens=10, temperature=0.9, seed=3, logprobs=2),
]


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3", "glm4_moe"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    tiny.make(request.param, directory)
    return directory


@pytest.mark.parametrize("blocks", [64, 12], ids=["at ease", "preempted"])
@pytest.mark.parametrize("capture", [None, run_again], ids=["by kernel", "captured"])
def test_the_answers_are_those_of_the_cpu(directory: Path, capture, blocks: int) -> None:
    wanted = answer(engine_on(load_model(open_checkpoint(directory), torch.float32)), SUBMITS)
    engine = engine_on(device_model(directory, capture=capture), blocks=blocks, budget=16)
    ours = answer(engine, SUBMITS)
    assert ours.tokens == wanted.tokens
    assert ours.finished == wanted.finished
    assert not ours.failed
    assert (engine.stats().num_preemptions > 0) == (blocks < 64)


@pytest.mark.parametrize("capture", [None, run_again], ids=["by kernel", "captured"])
def test_every_routed_token_is_counted_once_per_chosen_expert(directory: Path, capture) -> None:
    counts = []
    for model in (load_model(open_checkpoint(directory), torch.float32), device_model(directory, capture=capture)):
        engine = engine_on(model)
        answer(engine, SUBMITS)
        counts.append(engine.stats().expert_tokens)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("capture", [None, run_again], ids=["by kernel", "captured"])
def test_an_expert_that_is_not_finite_fails_the_requests_that_it_fails_on_the_cpu(tmp_path: Path, capture) -> None:
    theirs = tiny.make("qwen3_moe", tmp_path)
    with torch.no_grad():
        theirs.model.layers[1].mlp.experts.down_proj[3, 0, 0] = float("nan")
    theirs.save_pretrained(tmp_path)
    submits = [request(str(i), [3 + 7 * i, 4 + 5 * i], max_tokens=3, temperature=0) for i in range(12)]
    wanted = answer(engine_on(load_model(open_checkpoint(tmp_path), torch.float32)), submits)
    ours = answer(engine_on(device_model(tmp_path, capture=capture)), submits)
    assert 0 < len(wanted.failed) < len(submits)
    assert ours.failed == wanted.failed
    assert ours.tokens == wanted.tokens
