"""A decode step is padded to the size of a graph, and what pads it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from router.kv_cache.storage import nowhere
from router.model.batch import Batch
from router.model.device.graphs import MAX_ROWS, blank, pack, padded_rows, padded_width, unpack
from router.model.load import Model
from router.model.spec import MoESpec
from tests import tiny
from tests.device_models import device_model, run_again

BLOCK, NUM_BLOCKS, WIDTH = 4, 12, 3
FAMILIES = ["qwen3_moe", "deepseek_v3", "glm4_moe"]


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """On a device, computed as it comes and padded."""
    directory = tmp_path_factory.mktemp(request.param)
    tiny.make(request.param, directory)
    return device_model(directory), device_model(directory, capture=run_again)


def prompt_of(sequence: int, blocks: list[int], length: int) -> Batch:
    """The prefill of one sequence whose blocks are these."""
    places = torch.arange(length, dtype=torch.int32)
    table = torch.tensor(blocks, dtype=torch.int32)
    return Batch(
        token_ids=3 + sequence * 17 + places,
        positions=places,
        seq_ids=torch.zeros(length, dtype=torch.int32),
        slots=table[places // BLOCK] * BLOCK + places % BLOCK,
        block_tables=table[None],
        sample_rows=torch.tensor([length - 1]),
    )


def decode_of(tables: list[list[int]], lengths: list[int], sampled: list[int]) -> Batch:
    """One row of each sequence at the position after its length."""
    positions = torch.tensor(lengths, dtype=torch.int32)
    block_tables = torch.tensor(tables, dtype=torch.int32)
    blocks = block_tables[torch.arange(len(tables)), positions // BLOCK]
    return Batch(
        token_ids=positions + 40,
        positions=positions,
        seq_ids=torch.arange(len(tables), dtype=torch.int32),
        slots=blocks * BLOCK + positions % BLOCK,
        block_tables=block_tables,
        sample_rows=torch.tensor(sampled, dtype=torch.int64),
    )


@st.composite
def decodes(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[int]]:
    """Tables, lengths and sampled rows of one to four sequences, whose blocks are anywhere."""
    count = draw(st.integers(1, 4))
    blocks = draw(st.permutations(range(NUM_BLOCKS)))
    tables = [blocks[i * WIDTH : (i + 1) * WIDTH] for i in range(count)]
    lengths = draw(st.lists(st.integers(1, WIDTH * BLOCK - 1), min_size=count, max_size=count))
    return tables, lengths, sorted(draw(st.sets(st.integers(0, count - 1), min_size=1)))


@settings(max_examples=30, deadline=None)
@given(decode=decodes())
def test_padding_changes_no_logits_and_no_cache(
    models: tuple[Model, Model], decode: tuple[list[list[int]], list[int], list[int]]
) -> None:
    tables, lengths, _ = decode
    results = []
    for model in models:
        cache = model.trunk.allocate_cache(NUM_BLOCKS, BLOCK)
        with torch.inference_mode():
            for sequence, (table, length) in enumerate(zip(tables, lengths, strict=True)):
                model.trunk.forward(prompt_of(sequence, table, length), cache, 0)
            logits, failed = model.trunk.forward(decode_of(*decode), cache, 1)
        assert not failed.any()
        assert len(failed) == len(tables)
        results.append((logits, cache[:, :, :NUM_BLOCKS]))
    (logits, cache), (padded_logits, padded_cache) = results
    torch.testing.assert_close(padded_logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded_cache, cache, rtol=1e-5, atol=1e-5)


def test_padding_asks_for_no_expert(models: tuple[Model, Model]) -> None:
    padded = models[1]
    assert padded.pool is not None
    top_k = [layer.gate.top_k if isinstance(layer, MoESpec) else 0 for layer in padded.spec.layers]
    before = padded.pool.expert_tokens.sum(dim=1)
    with torch.inference_mode():
        cache = padded.trunk.allocate_cache(NUM_BLOCKS, BLOCK)
        padded.trunk.forward(decode_of([[0, 1, 2], [3, 4, 5], [6, 7, 8]], [1, 2, 3], [0, 1, 2]), cache, 0)
    assert (padded.pool.expert_tokens.sum(dim=1) - before).tolist() == [3 * k for k in top_k]


@pytest.mark.parametrize("captured", [False, True], ids=["as it comes", "padded"])
def test_what_is_left_in_a_block_disturbs_no_other_request(models: tuple[Model, Model], captured: bool) -> None:
    """Not even values that are not finite, which a request that failed has left there."""
    model = models[captured]
    batch = decode_of([[0, 1, 2], [3, 4, 5]], [1, 9], [0, 1])
    logits = []
    for left in (0.0, float("nan")):
        cache = model.trunk.allocate_cache(NUM_BLOCKS, BLOCK)
        with torch.inference_mode():
            for sequence, (table, length) in enumerate(zip(batch.block_tables.tolist(), [1, 9], strict=True)):
                model.trunk.forward(prompt_of(sequence, table, length), cache, 0)
            cache[:, :, [1, 2]] = left
            cache[:, :, 0, 2:] = left
            logits.append(model.trunk.forward(batch, cache, 1)[0])
    assert torch.equal(*logits)


@given(num_rows=st.integers(1, MAX_ROWS))
def test_few_sizes_hold_every_batch(num_rows: int) -> None:
    size = padded_rows(num_rows)
    assert num_rows <= size < num_rows + 8
    assert padded_rows(size) == size
    assert size in {1, 2, 4} or size % 8 == 0


@given(width=st.integers(1, 600), most=st.integers(1, 600))
def test_few_widths_hold_every_table(width: int, most: int) -> None:
    padded = padded_width(width, most)
    assert width <= padded <= max(width, most)
    assert padded_width(padded, most) == padded
    assert padded in {width, most} or padded.bit_count() == 1


def test_a_packed_batch_begins_with_its_rows_and_ends_with_padding() -> None:
    batch = decode_of([[5, 6, 7], [1, 2, 3]], [5, 2], [0, 1])
    inputs = unpack(pack(batch, 4, 8, BLOCK, nowhere=51), BLOCK)
    for name in ("token_ids", "positions", "slots"):
        assert torch.equal(getattr(inputs, name)[:2], getattr(batch, name))
    assert inputs.slots[2:].tolist() == [51, 51]
    assert inputs.block_tables[:2, :3].tolist() == [[5, 6, 7], [1, 2, 3]]
    assert torch.equal(pack(batch, 4, 8, BLOCK, nowhere=51)[2:], blank(2, 8, BLOCK, nowhere=51))


def test_a_size_is_captured_once_for_each_cache(tmp_path: Path) -> None:
    captured = []

    def capture(run: Callable[[], None], before: Callable[[], None]) -> Callable[[], None]:
        captured.append(run)
        return run

    tiny.make("qwen3_moe", tmp_path)
    trunk = device_model(tmp_path, capture=capture).trunk
    tables, lengths = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]], [1, 2, 3, 4]
    three, four = (decode_of(tables[:n], lengths[:n], [0]) for n in (3, 4))
    with torch.inference_mode():
        cache, another = (trunk.allocate_cache(NUM_BLOCKS, BLOCK) for _ in range(2))
        for batch in (three, four, three):
            trunk.forward(batch, cache, 0)
        assert len(captured) == 1
        trunk.forward(three, another, 0)
    assert len(captured) == 2


def test_the_slot_of_padding_is_in_a_block_of_its_own(models: tuple[Model, Model]) -> None:
    cache = models[0].trunk.allocate_cache(NUM_BLOCKS, BLOCK)
    assert nowhere(cache) // BLOCK == NUM_BLOCKS


def test_padding_stays_finite_whatever_the_model_makes_of_token_0_and_others_have_left(tmp_path: Path) -> None:
    theirs = tiny.make("qwen3_moe", tmp_path)
    with torch.no_grad():
        theirs.model.embed_tokens.weight[0] = float("nan")
    theirs.save_pretrained(tmp_path)
    logits = []
    for capture in (None, run_again):
        trunk = device_model(tmp_path, capture=capture).trunk
        cache = trunk.allocate_cache(NUM_BLOCKS, BLOCK)
        cache[:, :, 0] = float("nan")
        batch = decode_of([[1, 2, 3], [4, 5, 6], [7, 8, 9]], [1, 2, 3], [0, 1, 2])
        with torch.inference_mode():
            for _ in range(2):  # the second step reads what the first one's padding has written
                logits.append(trunk.forward(batch, cache, 0)[0])
    assert all(row.isfinite().all() for row in logits)
    torch.testing.assert_close(logits[3], logits[1], rtol=1e-5, atol=1e-5)


def without_values(run: Callable[[], None], before: Callable[[], None]) -> Callable[[], None]:
    """A Capture that, as CUDA's, refuses what would wait for a value: it runs on tensors that have none."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        run()
    return run


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_a_decode_step_asks_the_device_for_no_value(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experts.device.products.has_grouped_product", lambda *_: True)
    tiny.make(family, tmp_path)
    trunk = device_model(tmp_path, torch.bfloat16, capture=without_values).trunk
    batch = decode_of([[0, 1, 2], [3, 4, 5], [6, 7, 8]], [1, 2, 3], [0, 2])
    with torch.inference_mode():
        logits, _ = trunk.forward(batch, trunk.allocate_cache(NUM_BLOCKS, BLOCK), 0)
    assert logits.isfinite().all()


def test_a_loop_over_experts_asks_for_values(tmp_path: Path) -> None:
    """So DeviceExperts.capturable is False for it."""
    tiny.make("qwen3_moe", tmp_path)
    trunk = device_model(tmp_path, capture=without_values).trunk
    with torch.inference_mode(), pytest.raises(DataDependentOutputException):
        trunk.forward(decode_of([[0, 1, 2]], [1], [0]), trunk.allocate_cache(NUM_BLOCKS, BLOCK), 0)
