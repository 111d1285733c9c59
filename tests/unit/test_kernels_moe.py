"""The routed experts of one layer, in every variant that this machine runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from experts import kernels
from experts.kernels import reference
from tests.kernel_variants import DTYPES, close, few, values, variant  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("variant")


def table(num_experts: int, hidden: int, intermediate: int, dtype: torch.dtype) -> kernels.ExpertTable:
    gate = values(num_experts, intermediate, hidden, dtype=dtype, seed=1) / hidden**0.5
    up = values(num_experts, intermediate, hidden, dtype=dtype, seed=2) / hidden**0.5
    down = values(num_experts, hidden, intermediate, dtype=dtype, seed=3) / intermediate**0.5
    return kernels.ExpertTable(
        {expert: (gate[expert], up[expert], down[expert]) for expert in range(num_experts)}, num_experts
    )


def routing(n: int, k: int, num_experts: int, skip: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 1000 + k)
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:k] for _ in range(n)]).to(torch.int32)
    if skip:
        ids[torch.rand(n, k, generator=generator) < 0.4] = -1
    return ids, torch.rand(n, k, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(
    n=st.integers(1, 40),
    hidden=st.integers(1, 100),
    intermediate=st.integers(1, 150),
    num_experts=st.integers(1, 12),
    k=st.integers(1, 12),
    skip=st.booleans(),
)
def test_moe_equals_its_reference(dtype, n, hidden, intermediate, num_experts, k, skip):
    experts = table(num_experts, hidden, intermediate, dtype)
    x, (ids, weights) = values(n, hidden, dtype=dtype), routing(n, min(k, num_experts), num_experts, skip)
    rows, failed = kernels.moe(x, ids, weights, experts)
    assert not failed.any()
    close(rows, reference.moe(x, ids, weights, experts)[0])


def test_a_token_without_experts_is_zero():
    ids = torch.full((3, 2), -1, dtype=torch.int32)
    rows, failed = kernels.moe(values(3, 20), ids, torch.ones(3, 2), table(4, 20, 8, torch.float32))
    assert torch.equal(rows, torch.zeros(3, 20))
    assert not failed.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "intermediate"), [(96, 64), (75, 130)])
def test_a_row_of_moe_has_the_same_bytes_in_any_batch(dtype, hidden, intermediate):
    experts = table(9, hidden, intermediate, dtype)
    x, (ids, weights) = values(200, hidden, dtype=dtype), routing(200, 4, 9, skip=True)
    kernels.set_num_threads(1)
    alone = torch.cat([kernels.moe(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], experts)[0] for t in range(200)])
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    for threads in (1, 2):
        kernels.set_num_threads(threads)
        for n in (2, 7, 33, 200):
            some = order[:n]
            assert torch.equal(kernels.moe(x[some], ids[some], weights[some], experts)[0], alone[some])
    kernels.set_num_threads(2)


def test_the_sum_runs_in_top_k_order():
    """With down = c I and gate, up making 1, expert c yields c: 1e8, 1, -1e8 in float32 is order-dependent."""
    one = torch.full((1, 1), 1.0)
    scales = (1e8, 1.0, -1e8)
    experts = kernels.ExpertTable({e: (one, one, torch.full((1, 1), c)) for e, c in enumerate(scales)}, 3)
    x, weights = torch.full((1, 1), 20.0), torch.full((1, 3), 1.0)  # silu(20) * 20 is about 400 for every expert
    for ids in ([0, 1, 2], [0, 2, 1], [1, 0, 2]):
        rows, _ = kernels.moe(x, torch.tensor([ids], dtype=torch.int32), weights, experts)
        activated = torch.nn.functional.silu(x) * x
        total = torch.zeros(1, 1)
        for expert in ids:
            total = total + activated * scales[expert]
        torch.testing.assert_close(rows, total, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_bad_expert_fails_exactly_the_tokens_that_chose_it(dtype, bad, which):
    experts = table(6, 40, 30, dtype)
    x, (ids, weights) = values(50, 40, dtype=dtype), routing(50, 2, 6)
    healthy, _ = kernels.moe(x, ids, weights, experts)
    experts[3][which][7, 11] = bad
    rows, failed = kernels.moe(x, ids, weights, experts)
    touched = (ids == 3).any(1)
    assert torch.equal(failed, touched)
    assert torch.equal(rows, healthy.masked_fill(touched[:, None], 0))
    assert torch.equal(reference.moe(x, ids, weights, experts)[1], touched)


@pytest.mark.parametrize("expert", [5, 2, -2])
def test_an_expert_that_is_not_held_is_refused(expert):
    held = table(2, 16, 8, torch.float32)
    experts = kernels.ExpertTable({0: held[0], 1: held[1]}, 5)
    ids = torch.tensor([[0, expert]], dtype=torch.int32)
    with pytest.raises(KeyError, match=str(expert)):
        kernels.moe(values(1, 16), ids, torch.ones(1, 2), experts)


def test_a_table_refuses_a_weight_of_another_shape():
    good, bad = torch.zeros(8, 16), torch.zeros(8, 15)
    with pytest.raises(ValueError, match=r"expert 1: .*\(8, 15\)"):
        kernels.ExpertTable({0: (good, good, good.T.contiguous()), 1: (good, bad, good.T.contiguous())}, 2)
