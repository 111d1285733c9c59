"""A transformers model on real workers: the same bytes as without them, also when one is killed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from barista.errors import ConfigError
from experts.adapters.transformers import PooledExperts, connect, load_without_experts
from experts.checkpoint import open_checkpoint
from experts.pool import ExpertPool
from router.model.load import load_model
from tests.distributed.static_pool import StaticPool, everything, shared_out, static_pool
from tests.distributed.workers import TOKEN, expert_model
from tests.unit.tiny_model import write_tiny_model

PROMPTS = torch.tensor([[5, 17, 3, 99, 42, 8], [2, 2, 7, 23, 64, 11]])
MASK = (PROMPTS != 2).long()
LENGTH = 24
PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"

Generated = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    transformers.logging.disable_progress_bar()
    return write_tiny_model(
        tmp_path_factory.mktemp("tiny"), model_type="qwen3_moe", num_experts=10, num_experts_per_tok=3
    )


@pytest.fixture(scope="module")
def pool(path) -> Iterator[StaticPool]:
    with static_pool(expert_model(path), "worker-0", "worker-1") as running:
        yield running


@pytest.fixture
def model(path) -> transformers.PreTrainedModel:
    return load_without_experts(path, dtype=torch.float32)


@pytest.fixture(scope="module")
def expected(path) -> Generated:
    """What the model says with its experts in this process."""
    model = load_without_experts(path, dtype=torch.float32)
    local = load_model(open_checkpoint(path), torch.float32).pool
    assert isinstance(local, ExpertPool)
    with PooledExperts(model, local):
        return generate(model)


def generate(
    model: transformers.PreTrainedModel, after_each_token: Callable[[int], None] = lambda token: None
) -> Generated:
    """Token ids, and the logits of each of them."""

    def criterion(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        after_each_token(ids.shape[1] - PROMPTS.shape[1])
        return torch.zeros(len(ids), dtype=torch.bool)

    output = model.generate(
        PROMPTS,
        attention_mask=MASK,
        max_new_tokens=LENGTH,
        min_new_tokens=LENGTH,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        stopping_criteria=transformers.StoppingCriteriaList([criterion]),
    )
    return output.sequences, torch.stack(output.logits)


def assert_same_bytes(got: Generated, expected: Generated) -> None:
    assert got[0].tolist() == expected[0].tolist()
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_workers_give_the_bytes_of_local_experts(transport, path, pool, model, expected):
    pool.assign(shared_out(pool.model, "worker-0", "worker-1"))
    # The prompts have more rows than a message takes.
    with connect(model, path, pool.controller.address, TOKEN, transport=transport, max_rows=8):
        assert_same_bytes(generate(model), expected)


def test_the_example_of_the_documentation_runs(path, pool, capsys):
    pool.assign(shared_out(pool.model, "worker-0", "worker-1"))
    _, example = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)  # the first one asks Ray
    names = {"path": str(path), "controller": pool.controller.address, "token": TOKEN}
    exec(compile(example, PAGE, "exec"), names)
    assert capsys.readouterr().out.startswith("The secret of a good espresso is")


def test_a_pool_of_another_dtype_is_refused(path, pool):
    model = load_without_experts(path, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="another dtype than bfloat16"):
        connect(model, path, pool.controller.address, TOKEN)


def test_a_pool_that_cannot_be_reached_is_an_error(path, pool, model):
    with pytest.raises(ConfigError, match="controller does not answer"):
        connect(model, path, "127.0.0.1:9", TOKEN, timeout=0.1)


def test_a_killed_worker_changes_nothing(path, pool, model, expected):
    """The last test: the worker does not come back."""
    pool.assign(everything(pool.model, "worker-0", "worker-1"))

    def kill(token: int) -> None:
        if token == LENGTH // 2:
            pool.workers["worker-1"].kill()

    with connect(model, path, pool.controller.address, TOKEN):
        assert_same_bytes(generate(model, kill), expected)
    assert pool.workers["worker-1"].process.poll() is not None
