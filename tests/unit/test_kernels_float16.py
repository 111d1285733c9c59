"""float16 weights beside float32 rows give the bytes that the same weights in float32 give, in every variant."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts import kernels
from tests.kernel_variants import few, values, variant  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("variant")


def half(*shape: int, seed: int) -> torch.Tensor:
    """Every kind of float16 that a weight can be: normal, subnormal, zero, the largest."""
    w = values(*shape, seed=seed).half()
    flat = w.view(-1)
    flat[::7] *= 1e-6
    flat[::11] = 0
    flat[::13] = 65504
    return w


@few
@given(n=st.integers(1, 30), inputs=st.integers(1, 90), outputs=st.integers(1, 90), biased=st.booleans())
def test_linear_is_that_of_the_widened_weight(n: int, inputs: int, outputs: int, biased: bool) -> None:
    x, w = values(n, inputs), half(outputs, inputs, seed=n)
    bias = values(outputs, seed=2) if biased else None
    assert torch.equal(kernels.linear(x, w, bias), kernels.linear(x, w.float(), bias))


@few
@given(n=st.integers(1, 30), hidden=st.integers(1, 70), intermediate=st.integers(1, 90), k=st.integers(1, 3))
def test_moe_is_that_of_the_widened_experts(n: int, hidden: int, intermediate: int, k: int) -> None:
    shapes = (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)
    weights = {e: tuple(values(*shape, seed=e + 7 * i).half() for i, shape in enumerate(shapes)) for e in range(3)}
    widened = {e: tuple(w.float() for w in experts) for e, experts in weights.items()}
    x, topk_weights = values(n, hidden), values(n, k, seed=3)
    topk_ids = torch.stack([torch.randperm(3)[:k] for _ in range(n)]).int()
    rows, failed = kernels.moe(x, topk_ids, topk_weights, kernels.ExpertTable(weights, 3))
    expected, _ = kernels.moe(x, topk_ids, topk_weights, kernels.ExpertTable(widened, 3))
    assert torch.equal(rows, expected)
    assert not failed.any()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_weight_that_is_not_finite_stays_so(value: float) -> None:
    weight = torch.tensor([[value]], dtype=torch.float16)
    assert not kernels.linear(torch.ones(1, 1), weight).isfinite().any()
