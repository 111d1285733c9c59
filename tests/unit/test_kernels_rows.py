"""Expert rows and their sum, apart from each other, are `moe` to the byte, in every variant that this machine runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from experts import kernels
from experts.kernels import reference, reference_rows
from tests.kernel_variants import close, few, values, variant  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("variant")

WEIGHTS = [torch.float32, torch.bfloat16, torch.float16]
ROWS = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}


def weights(num_experts: int, hidden: int, intermediate: int, dtype: torch.dtype) -> dict[int, tuple[Tensor, ...]]:
    gate = (values(num_experts, intermediate, hidden, seed=1) / hidden**0.5).to(dtype)
    up = (values(num_experts, intermediate, hidden, seed=2) / hidden**0.5).to(dtype)
    down = (values(num_experts, hidden, intermediate, seed=3) / intermediate**0.5).to(dtype)
    return {expert: (gate[expert], up[expert], down[expert]) for expert in range(num_experts)}


def choices(n: int, k: int, num_experts: int, seed: int) -> Tensor:
    """[n, k] int32: distinct experts, some of them -1."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:k] for _ in range(n)]).to(torch.int32)
    ids[torch.rand(n, k, generator=generator) < 0.2] = -1
    return ids


def as_bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)


def through_workers(x: Tensor, ids: Tensor, topk_weights: Tensor, tables: list[kernels.ExpertTable], owner: np.ndarray):
    """`moe` as a pool does it: every table computes the pairs of its experts, and the rows meet again."""
    addresses = np.zeros(ids.shape, np.int64)
    kept = []
    for worker, table in enumerate(tables):
        tokens, part, num_pairs = kernels.split(ids, owner, worker)
        rows = kernels.expert_rows(x[tokens], torch.from_numpy(part), table)
        assert len(rows) == num_pairs
        kernels.place_rows(addresses, tokens, part, rows.data_ptr(), rows.shape[1] * rows.element_size())
        kept.append(rows)
    return kernels.combine_rows(addresses, topk_weights, x.shape[1], x.dtype)


@pytest.mark.parametrize("dtype", WEIGHTS)
@few
@given(
    n=st.integers(1, 40),
    hidden=st.integers(1, 100),
    intermediate=st.integers(1, 150),
    k=st.integers(1, 8),
    num_workers=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_experts_split_over_tables_give_the_bytes_of_moe(dtype, n, hidden, intermediate, k, num_workers, seed):
    experts = weights(8, hidden, intermediate, dtype)
    owner = np.random.default_rng(seed).integers(0, num_workers, 8, dtype=np.int32)
    tables = [
        kernels.ExpertTable(
            {expert: experts[expert] for expert in range(8) if owner[expert] == worker},
            8,
            dtype=ROWS[dtype],
            hidden_size=hidden,
            intermediate_size=intermediate,
        )
        for worker in range(num_workers)
    ]
    x, ids = values(n, hidden, dtype=ROWS[dtype], seed=seed), choices(n, k, 8, seed)
    topk_weights = values(n, k, seed=seed + 1)
    rows, failed = through_workers(x, ids, topk_weights, tables, owner)
    expected, expected_failed = kernels.moe(x, ids, topk_weights, kernels.ExpertTable(experts, 8))
    assert torch.equal(as_bytes(rows), as_bytes(expected))
    assert torch.equal(failed, expected_failed)


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize(("hidden", "intermediate"), [(96, 64), (75, 130)])
def test_an_expert_row_has_the_same_bytes_in_any_batch(dtype, hidden, intermediate):
    experts = kernels.ExpertTable(weights(9, hidden, intermediate, dtype), 9)
    x, ids = values(150, hidden, dtype=ROWS[dtype]), choices(150, 4, 9, seed=0)
    kernels.set_num_threads(1)
    alone = [kernels.expert_rows(x[t : t + 1], ids[t : t + 1], experts) for t in range(150)]
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    for threads in (1, 2):
        kernels.set_num_threads(threads)
        for n in (2, 7, 33, 150):
            some = order[:n]
            expected = torch.cat([alone[token] for token in some])
            assert torch.equal(as_bytes(kernels.expert_rows(x[some], ids[some], experts)), as_bytes(expected))
    kernels.set_num_threads(2)


@pytest.mark.parametrize("dtype", WEIGHTS)
def test_expert_rows_equal_their_reference(dtype):
    experts = kernels.ExpertTable(weights(6, 75, 40, dtype), 6)
    x, ids = values(20, 75, dtype=ROWS[dtype]), choices(20, 3, 6, seed=1)
    rows = kernels.expert_rows(x, ids, experts)
    expected = torch.empty_like(rows)
    assert reference_rows.write_expert_rows(x, ids, experts, expected.data_ptr()) == len(rows) == (ids >= 0).sum()
    close(rows, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@few
@given(n=st.integers(1, 20), k=st.integers(1, 8), hidden=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_the_sum_has_the_bytes_of_its_reference(dtype, n, k, hidden, seed):
    rows = values(n * k, hidden, dtype=dtype, seed=seed)
    rows[:: 7 + seed % 5, hidden // 2] = (torch.nan, torch.inf, -torch.inf)[seed % 3]
    size = hidden * rows.element_size()
    addresses = (rows.data_ptr() + np.arange(n * k) * size).reshape(n, k)
    addresses[np.random.default_rng(seed).random((n, k)) < 0.2] = 0
    topk_weights = values(n, k, seed=seed + 1)
    total, failed = kernels.combine_rows(addresses, topk_weights, hidden, dtype)
    expected, expected_failed = reference_rows.combine_rows(addresses, topk_weights, hidden, dtype)
    assert torch.equal(as_bytes(total), as_bytes(expected))
    assert torch.equal(failed, expected_failed)


def test_rows_go_to_the_room_that_is_given_and_no_further():
    experts = kernels.ExpertTable(weights(5, 20, 8, torch.float32), 5)
    x, ids = values(6, 20), choices(6, 3, 5, seed=2)
    expected = kernels.expert_rows(x, ids, experts)
    room = torch.full((18, 20), 7.0)
    assert kernels.expert_rows(x, ids, experts, out=room).data_ptr() == room.data_ptr()
    assert torch.equal(room[: len(expected)], expected)
    assert (room[len(expected) :] == 7).all()
    room.fill_(7)
    assert kernels.expert_rows(x, ids, experts, out=room.data_ptr() + 40 * 4) == len(expected)
    assert torch.equal(room.view(-1)[40:][: expected.numel()], expected.view(-1))


def test_rows_of_a_view_are_read_in_place():
    experts = kernels.ExpertTable(weights(5, 20, 8, torch.float32), 5)
    wide, ids = values(6, 33), choices(6, 3, 5, seed=2)
    view = wide[:, 3:23]
    assert torch.equal(kernels.expert_rows(view, ids, experts), kernels.expert_rows(view.contiguous(), ids, experts))


def test_a_table_without_experts_computes_nothing_and_refuses_all():
    empty = kernels.ExpertTable({}, 4, dtype=torch.bfloat16, hidden_size=16, intermediate_size=8)
    x = values(3, 16, dtype=torch.bfloat16)
    assert kernels.expert_rows(x, torch.full((3, 2), -1, dtype=torch.int32), empty).shape == (0, 16)
    with pytest.raises(KeyError, match=r"\(1, 3\)"):
        kernels.expert_rows(x, torch.tensor([[3, -1], [1, 3], [-1, -1]], dtype=torch.int32), empty)


def test_a_table_without_experts_needs_its_sizes():
    with pytest.raises(ValueError, match="hidden_size"):
        kernels.ExpertTable({}, 4, dtype=torch.float32)


@pytest.mark.parametrize("module", [kernels, reference_rows], ids=["compiled", "reference"])
def test_an_expert_that_is_not_held_is_refused_before_anything_is_written(module):
    held = weights(2, 16, 8, torch.float32)
    experts = kernels.ExpertTable(held, 5)
    room = torch.full((2, 16), 7.0)
    for expert in (5, 2, -2):
        ids = torch.tensor([[0, expert]], dtype=torch.int32)
        assert experts.not_held(ids) == (expert,)
        write = (
            (lambda ids=ids: kernels.expert_rows(values(1, 16), ids, experts, out=room))
            if module is kernels
            else (lambda ids=ids: reference_rows.write_expert_rows(values(1, 16), ids, experts, room.data_ptr()))
        )
        with pytest.raises(KeyError, match=str(expert)):
            write()
    assert (room == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_found(dtype, bad):
    rows = values(60, 37, dtype=dtype)
    rows[0, 0] = torch.finfo(dtype).max
    rows[::7, 36] = bad
    rows[3, 5] = bad
    expected = ~rows.isfinite().all(-1).numpy()
    assert np.array_equal(kernels.find_nonfinite(rows.data_ptr(), 60, 37, dtype), expected)
    assert np.array_equal(reference_rows.find_nonfinite(rows.data_ptr(), 60, 37, dtype), expected)
    assert kernels.find_nonfinite(rows.data_ptr(), 0, 37, dtype).shape == (0,)


def test_the_reference_stands_in_for_all_of_it(monkeypatch):
    monkeypatch.setattr(kernels.rows, "current", lambda: None)
    monkeypatch.setattr(kernels.routing, "current", lambda: None)
    experts = weights(6, 40, 24, torch.float32)
    owner = np.array([0, 1, 0, 1, 0, 1], np.int32)
    tables = [kernels.ExpertTable({e: experts[e] for e in range(worker, 6, 2)}, 6) for worker in range(2)]
    x, ids, topk_weights = values(12, 40), choices(12, 3, 6, seed=4), values(12, 3, seed=5)
    rows, failed = through_workers(x, ids, topk_weights, tables, owner)
    close(rows, reference.moe(x, ids, topk_weights, kernels.ExpertTable(experts, 6))[0])
    assert not failed.any()
