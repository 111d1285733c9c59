"""The kernels on rows: linear, RMSNorm, SiLU gating and rotary embedding, in every variant that this machine runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts import kernels
from experts.kernels import reference
from tests.kernel_variants import DTYPES, close, few, values, variant  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("variant")


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(n=st.integers(1, 40), width=st.integers(1, 200), out=st.integers(1, 80), bias=st.booleans())
def test_linear_equals_its_reference(dtype, n, width, out, bias):
    x, weight = values(n, width, dtype=dtype), values(out, width, dtype=dtype, seed=1) / width**0.5
    arguments = (x, weight, values(out, dtype=dtype, seed=2) if bias else None)
    close(kernels.linear(*arguments), reference.linear(*arguments))
    logits = kernels.linear(*arguments, out_dtype=torch.float32)
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits, reference.linear(*arguments, out_dtype=torch.float32), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_reads_weights_at_any_alignment_and_writes_where_it_is_told(dtype):
    flat = values(1 + 33 * 70, dtype=dtype)
    weight, x = flat[1:].view(33, 70), values(9, 140, dtype=dtype)[:, :70]
    buffer = torch.full((9, 50), 7.0, dtype=dtype)
    out = buffer[:, 3:36]
    assert kernels.linear(x, weight, out=out) is out
    assert torch.equal(out, kernels.linear(x.clone(), weight.clone()))
    assert (buffer[:, :3] == 7).all()
    assert (buffer[:, 36:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "out"), [(576, 192), (75, 301), (2048, 40)])
def test_a_row_of_linear_has_the_same_bytes_in_any_batch(dtype, width, out):
    x, weight = values(150, width, dtype=dtype), values(out, width, dtype=dtype, seed=1)
    kernels.set_num_threads(1)
    alone = torch.cat([kernels.linear(row[None], weight) for row in x])
    for threads in (1, 2, 3):
        kernels.set_num_threads(threads)
        for n in (*range(1, 30), 64, 149, 150):
            assert torch.equal(kernels.linear(x[150 - n :], weight), alone[150 - n :])
    kernels.set_num_threads(2)


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(n=st.integers(1, 40), width=st.integers(1, 200), with_residual=st.booleans())
def test_rms_norm_equals_its_reference(dtype, n, width, with_residual):
    x, weight = values(n, width, dtype=dtype), values(width, dtype=dtype, seed=1)
    residual = values(n, width, dtype=dtype, seed=2) if with_residual else None
    expected_residual = residual.clone() if residual is not None else None
    actual = kernels.rms_norm(x, weight, 1e-5, residual=residual)
    close(actual, reference.rms_norm(x, weight, 1e-5, residual=expected_residual))
    if residual is not None:
        assert torch.equal(residual, expected_residual)


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(n=st.integers(1, 40), width=st.integers(1, 200))
def test_silu_mul_equals_its_reference_over_halves_of_one_buffer(dtype, n, width):
    gate, up = (values(n, 2 * width, dtype=dtype) * 5).chunk(2, dim=1)
    close(kernels.silu_mul(gate, up), reference.silu_mul(gate, up))


def test_silu_mul_holds_at_the_ends_of_the_range():
    gate = torch.tensor([[-torch.inf, -1e30, -104.0, -88.5, -87.4, 0.0, 87.4, 88.8, 1e30, torch.inf, torch.nan]])
    up = torch.ones_like(gate)
    expected = gate * torch.sigmoid(gate.double()).float()
    torch.testing.assert_close(
        kernels.silu_mul(gate, up)[:, 1:], expected[:, 1:], rtol=1e-5, atol=1e-36, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@few
@given(n=st.integers(1, 40), heads=st.integers(1, 5), half=st.integers(1, 40), rest=st.integers(0, 7))
def test_rope_equals_its_reference_and_leaves_the_rest_alone(dtype, interleaved, n, heads, half, rest):
    angles = values(n, half)
    # A view into a wider buffer, as the queries are in the output of a fused projection.
    x = values(n, heads + 2, 2 * half + rest, dtype=dtype, seed=1)[:, 1:-1]
    expected = reference.rope(x.clone(), angles.cos(), angles.sin(), interleaved)
    assert kernels.rope(x, angles.cos(), angles.sin(), interleaved) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_the_elementwise_kernels_has_the_same_bytes_in_any_batch(dtype):
    x, other, weight = values(300, 577, dtype=dtype), values(300, 577, dtype=dtype, seed=1), values(577, dtype=dtype)
    norms, products = kernels.rms_norm(x, weight, 1e-6), kernels.silu_mul(x, other)
    for row in range(0, 300, 7):
        assert torch.equal(kernels.rms_norm(x[row : row + 1], weight, 1e-6)[0], norms[row])
        assert torch.equal(kernels.silu_mul(x[row : row + 1], other[row : row + 1])[0], products[row])
