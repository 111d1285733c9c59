"""All layers of a step in one call are, to the byte, the layers one after another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from experts.checkpoint import open_checkpoint
from router.kv_cache.storage import allocate_cache
from router.model.batch import Batch
from router.model.load import Model, load_model
from tests import packable, tiny
from tests.kernel_variants import variant  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("variant")

BLOCK = 4
ROWS_OF = (3, 1, 6)  # three sequences


@pytest.fixture(scope="module", params=["qwen3_moe_sparse", "deepseek_v2", "glm4_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense layers, routed ones, routed ones with shared experts; grouped-query and latent attention."""
    directory = tmp_path_factory.mktemp(request.param)
    tiny.make(request.param, directory)
    return directory


def prompt() -> Batch:
    positions = [position for rows in ROWS_OF for position in range(rows)]
    seq_ids = [seq for seq, rows in enumerate(ROWS_OF) for _ in range(rows)]
    tables = torch.arange(6, dtype=torch.int32).view(3, 2)
    return Batch(
        token_ids=torch.tensor([5 + 7 * row for row in range(10)], dtype=torch.int32),
        positions=torch.tensor(positions, dtype=torch.int32),
        seq_ids=torch.tensor(seq_ids, dtype=torch.int32),
        slots=torch.tensor([8 * seq + at for seq, at in zip(seq_ids, positions, strict=True)], dtype=torch.int32),
        block_tables=tables,
        sample_rows=torch.tensor([2, 3, 9]),
    )


def outcome(model: Model) -> list[torch.Tensor]:
    """Logits, failed rows, the cache, and how many tokens each expert was given."""
    assert model.pool is not None
    before = model.pool.expert_tokens.clone()
    cache = allocate_cache(model.spec, 6, BLOCK, model.dtype).zero_()
    logits, failed = model.trunk.forward(prompt(), cache, 0)
    return [logits, failed, cache, model.pool.expert_tokens - before]


def layer_by_layer(model: Model) -> list[torch.Tensor]:
    """The same where something stands before the experts, as a pool does."""
    assert model.pool is not None
    with model.pool.through(lambda transport: Through(transport)):
        assert model.pool.tables is None
        return outcome(model)


class Through:
    def __init__(self, below: object) -> None:
        self.dispatch, self.combine = below.dispatch, below.combine  # type: ignore[attr-defined]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_gives_the_bytes_and_the_counts_of_layer_by_layer(folder: Path, dtype: torch.dtype) -> None:
    model = load_model(open_checkpoint(folder), dtype)
    assert model.pool is not None
    assert model.pool.tables is not None
    actual, expected = outcome(model), layer_by_layer(model)
    assert expected[3].sum() > 0
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


@torch.inference_mode()
def test_a_row_that_fails_in_any_layer_fails_alone(folder: Path) -> None:
    healthy, broken = (load_model(open_checkpoint(folder), torch.float32) for _ in range(2))
    layer = min(broken.pool.tables)  # type: ignore[union-attr, type-var, arg-type]
    _, failed, _, counts = outcome(healthy)
    assert not failed.any()
    expert = int(counts[layer].argmax())
    spoilt = broken.pool.tables[layer][expert][2]  # type: ignore[union-attr, index]
    spoilt.copy_(torch.full_like(spoilt, float("nan")))  # type: ignore[union-attr]
    actual, expected = outcome(broken), layer_by_layer(broken)
    assert torch.equal(actual[1], expected[1])
    assert 0 < int(actual[1].sum()) < len(actual[1])
    well = ~actual[1][[2, 3, 9]]
    assert torch.equal(actual[0][well], expected[0][well])


@torch.inference_mode()
@pytest.mark.parametrize("weight_format", ["fp8", "int8", "int4", "mxfp4"])
def test_weights_of_few_bits_give_the_same_bytes_too(
    weight_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packable.own_cache(tmp_path / "cache", monkeypatch)
    folder = packable.make("glm4_moe", tmp_path / "model")
    model = load_model(open_checkpoint(folder), torch.bfloat16, weight_format=weight_format)
    assert not isinstance(model.trunk.embedding, torch.Tensor)
    for ours, theirs in zip(outcome(model), layer_by_layer(model), strict=True):
        assert torch.equal(ours, theirs)


@torch.inference_mode()
def test_a_token_or_a_position_that_the_model_does_not_have_is_refused(folder: Path) -> None:
    model = load_model(open_checkpoint(folder), torch.float32, max_len=16)
    cache = allocate_cache(model.spec, 6, BLOCK, model.dtype)
    batch = prompt()
    for name, wrong in (("token_ids", model.spec.vocab_size), ("token_ids", -1), ("positions", 16)):
        numbers = getattr(batch, name).clone()
        numbers[1] = wrong
        with pytest.raises(IndexError):
            model.trunk.forward(dataclasses.replace(batch, **{name: numbers}), cache, 0)
