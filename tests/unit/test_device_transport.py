"""Dispatch and combine on a device give what the local transport gives, and fail the rows that it fails."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts import kernels
from experts.device.experts import DeviceExperts
from experts.device.pool import DevicePool
from experts.device.rows import combine, sort_by_expert
from experts.kernels.expert_table import ExpertWeights
from experts.pool import DispatchBatch, ExpertPool
from experts.transport.device import DeviceTransport
from experts.transport.local import LocalTransport
from tests.device_models import CPU, expert_weights

LAYER, NUM_EXPERTS, HIDDEN, INTERMEDIATE = 3, 6, 32, 24
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def weights(dtype: torch.dtype) -> list[ExpertWeights]:
    return expert_weights(NUM_EXPERTS, HIDDEN, INTERMEDIATE, dtype)


@st.composite
def choices(draw: st.DrawFn) -> list[list[int]]:
    """Distinct experts for each token, some of them none."""
    top_k = draw(st.integers(1, 4))
    one = st.permutations(range(NUM_EXPERTS)).map(lambda ids: ids[:top_k])
    tokens = draw(st.lists(one, min_size=1, max_size=9))
    none = draw(st.sets(st.tuples(st.integers(0, 8), st.integers(0, 3)), max_size=4))
    return [[-1 if (t, p) in none else e for p, e in enumerate(ids)] for t, ids in enumerate(tokens)]


def batch_of(ids: list[list[int]], dtype: torch.dtype) -> DispatchBatch:
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(len(ids), HIDDEN, generator=generator).to(dtype)
    topk_weights = torch.rand(len(ids), len(ids[0]), generator=generator)
    return DispatchBatch(0, LAYER, hidden_states, torch.tensor(ids, dtype=torch.int32), topk_weights)


def on_device(experts: list[ExpertWeights], dtype: torch.dtype) -> DeviceTransport:
    return DeviceTransport({LAYER: DeviceExperts(experts, device=CPU, dtype=dtype)})


def local(experts: list[ExpertWeights], dtype: torch.dtype) -> LocalTransport:
    return LocalTransport({LAYER: kernels.ExpertTable(dict(enumerate(experts)), NUM_EXPERTS, dtype=dtype)})


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=60, deadline=None)
@given(ids=choices())
def test_rows_equal_the_local_transport(dtype: torch.dtype, ids: list[list[int]]) -> None:
    experts, batch = weights(dtype), batch_of(ids, dtype)
    ours, theirs = (t.combine(t.dispatch(batch)) for t in (on_device(experts, dtype), local(experts, dtype)))
    torch.testing.assert_close(ours[0], theirs[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert not ours[1].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_fails_and_is_zero(value: float) -> None:
    experts = weights(torch.float32)
    experts[2][2][0, 0] = value  # type: ignore[index]
    batch = batch_of([[0, 1], [2, 3], [4, 2], [5, -1]], torch.float32)
    rows, failed = (transport := on_device(experts, torch.float32)).combine(transport.dispatch(batch))
    assert failed.tolist() == [False, True, True, False]
    assert not rows[failed].any()
    healthy = local(experts, torch.float32)
    torch.testing.assert_close(rows, healthy.combine(healthy.dispatch(batch))[0])


def test_what_a_row_holds_that_nobody_asked_for_is_not_added() -> None:
    """A grouped product leaves it undefined."""
    rows = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")]])
    ids, topk_weights = torch.tensor([[4, -1]], dtype=torch.int32), torch.tensor([[0.5, 0.5]])
    total, failed = combine(rows, ids, topk_weights)
    assert total.tolist() == [[0.5, 1.0]]
    assert not failed.any()


@settings(max_examples=60, deadline=None)
@given(ids=choices())
def test_pairs_lie_side_by_side_by_expert_in_their_own_order(ids: list[list[int]]) -> None:
    flat = [expert for token in ids for expert in token]
    order, ends = sort_by_expert(torch.tensor(ids, dtype=torch.int32), NUM_EXPERTS)
    assert order.tolist() == sorted(range(len(flat)), key=lambda pair: flat[pair] % (NUM_EXPERTS + 1))
    assert ends.dtype is torch.int32
    assert ends.tolist() == [sum(0 <= e <= expert for e in flat) for expert in range(NUM_EXPERTS)]


@settings(max_examples=20, deadline=None)
@given(ids=choices())
def test_the_device_counts_tokens_as_the_host_does(ids: list[list[int]]) -> None:
    experts, batch = weights(torch.float32), batch_of(ids, torch.float32)
    batch = DispatchBatch(0, LAYER, batch.hidden_states, batch.topk_ids.clamp(min=0), batch.topk_weights)
    pools = [
        DevicePool(on_device(experts, torch.float32), LAYER + 1, NUM_EXPERTS, CPU),
        ExpertPool(local(experts, torch.float32), LAYER + 1, NUM_EXPERTS),
    ]
    for pool in pools:
        for step in range(2):
            pool.begin(step, LAYER, batch.hidden_states, batch.topk_ids, batch.topk_weights).wait()
    assert torch.equal(pools[0].expert_tokens, pools[1].expert_tokens)


def test_the_device_counts_no_choice_of_none() -> None:
    pool = DevicePool(on_device(weights(torch.float32), torch.float32), LAYER + 1, NUM_EXPERTS, CPU)
    batch = batch_of([[1, -1], [-1, -1]], torch.float32)
    pool.begin(0, LAYER, batch.hidden_states, batch.topk_ids, batch.topk_weights).wait()
    assert pool.expert_tokens[LAYER].tolist() == [0, 1, 0, 0, 0, 0]
