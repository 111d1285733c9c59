"""Weights of few bits in the kernels: equal to decoding first, row by row the same, in every variant."""

from __future__ import annotations

from itertools import product

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from experts import kernels
from experts.formats import FP8, INT4, INT8, MXFP4, Q4_0, Q8_0, Format
from experts.formats.codec import from_ggml
from experts.kernels import compiler, library
from tests.kernel_variants import DTYPES, few, values, variant  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("variant")
FORMATS = [FP8, INT8, INT4, MXFP4, Q8_0, Q4_0]
every = pytest.mark.parametrize(
    ("form", "dtype"), list(product(FORMATS, DTYPES)), ids=lambda p: getattr(p, "name", str(p))
)


def held(form: Format, weight: Tensor) -> kernels.Weight:
    """A matrix in a format, by the way that a model's takes."""
    if form is FP8:
        return kernels.Fp8Weight(*kernels.encode_fp8(weight))
    shape = (weight.shape[0], weight.shape[1])
    if form in (Q8_0, Q4_0):
        blocks = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[form.name.upper()])
        return kernels.TiledWeight(form, shape, torch.from_numpy(from_ggml(form, blocks)))
    return kernels.TiledWeight(form, shape, kernels.encode(form, weight))


def rounding_bound(form: Format, x: Tensor, weight: Tensor) -> Tensor:
    """[n, out] float64: how far a product may be from decode-then-float64.

    Activations are rounded to integers of 8 or 16 bits by groups of 32 or 64, each to half a step; the rest is the
    float32 summation.
    """
    size, most = {INT8: (64, 32767), Q8_0: (64, 32767)}.get(form, (32, 127))
    absolute = weight.double().abs()
    summed = x.double().abs() @ absolute.T * x.shape[1] * 2**-24
    if form is FP8:
        return summed
    padded = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % size))
    steps = padded.view(len(x), -1, size).abs().amax(-1) / most
    of_each_input = steps.repeat_interleave(size, 1)[:, : x.shape[1]]
    return 0.5001 * of_each_input @ absolute.T + summed


@few
@given(n=st.integers(1, 30), groups=st.integers(1, 5), outputs=st.integers(1, 90), biased=st.booleans())
@every
def test_a_product_is_that_of_the_decoded_weight(form, dtype, n, groups, outputs, biased):
    x, weight = values(n, 64 * groups, dtype=dtype, seed=n), held(form, values(outputs, 64 * groups, seed=2))
    bias = values(outputs, dtype=dtype, seed=3) if biased else None
    decoded = weight.float()
    expected = x.double() @ decoded.double().T + (0 if bias is None else bias.double())
    error = (kernels.linear(x, weight, bias, out_dtype=torch.float32).double() - expected).abs()
    assert (error <= rounding_bound(form, x, decoded) + 1e-6 * expected.abs() + 1e-30).all()


@every
@pytest.mark.parametrize(("outputs", "inputs"), [(150, 192), (20, 5120)], ids=["many outputs", "many inputs"])
def test_a_row_does_not_depend_on_its_neighbours(form, dtype, outputs, inputs):
    x, weight = values(70, inputs, dtype=dtype), held(form, values(outputs, inputs, seed=1))
    together = kernels.linear(x, weight)
    for begin, end in ((0, 1), (3, 5), (7, 11), (0, 24), (20, 70)):
        assert torch.equal(kernels.linear(x[begin:end], weight), together[begin:end])


@every
def test_a_moe_layer_is_its_experts_one_by_one(form, dtype):
    shapes = (128, 192), (128, 192), (192, 128)
    experts = {e: tuple(held(form, values(*s, seed=10 * e + i) / 10) for i, s in enumerate(shapes)) for e in range(5)}
    table = kernels.ExpertTable(experts, 5, dtype=dtype)
    x, weights = values(40, 192, dtype=dtype), values(40, 2, seed=5).abs()
    ids = torch.stack([torch.randperm(5)[:2] for _ in range(40)]).int()
    rows, failed = kernels.moe(x, ids, weights, table)
    assert not failed.any()
    expected = torch.zeros(40, 192)
    for place in range(2):
        for token, expert in enumerate(ids[:, place].tolist()):
            gate, up, down = experts[expert]
            one = x[token : token + 1]
            activated = kernels.silu_mul(kernels.linear(one, gate), kernels.linear(one, up))
            expected[token] += kernels.linear(activated, down)[0].float() * weights[token, place]
    assert torch.equal(rows, expected.to(dtype))


@every
def test_threads_change_no_byte(form, dtype):
    x, weight = values(33, 128, dtype=dtype), held(form, values(200, 128, seed=1))
    kernels.set_num_threads(1)
    alone = kernels.linear(x, weight)
    kernels.set_num_threads(2)
    assert torch.equal(kernels.linear(x, weight), alone)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_an_activation_that_is_not_finite_makes_its_row_so_and_no_other(form, value):
    x, weight = values(3, 128), held(form, values(20, 128, seed=1) + 0.01)
    clean = kernels.linear(x, weight)
    x[1, 70] = value
    dirty = kernels.linear(x, weight)
    assert not dirty[1].isfinite().any()
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("form", [INT8, INT4, MXFP4, Q8_0, Q4_0], ids=lambda form: form.name)
def test_every_instruction_set_gives_the_same_bytes(form, variant):  # noqa: F811
    """Products of integers are exact and tiles are added in one order, so only a machine without fma may differ."""
    x, weight = values(30, 256, dtype=torch.bfloat16), held(form, values(50, 256, seed=1))
    here = kernels.linear(x, weight, out_dtype=torch.float32)
    library.use(library.Library(compiler.runnable_variants()[-1]))
    try:
        portable = kernels.linear(x, weight, out_dtype=torch.float32)
    finally:
        library.use(library.Library(next(v for v in compiler.VARIANTS if v.name == variant)))
    torch.testing.assert_close(here, portable, rtol=2e-6, atol=2e-6)


def test_extremes_do_not_overflow_the_sums():
    """All weights and activations at the ends of their ranges, of equal and of alternating signs."""
    signs = torch.ones(8, 512)
    signs[1::2, ::2] = -1
    for form in FORMATS:
        weight = held(form, torch.cat([signs, -signs]))
        decoded = weight.float()
        for x in (torch.full((2, 512), 127.0), signs[:2] * 127, -signs[:2] * 127):
            exact = x.double() @ decoded.double().T
            got = kernels.linear(x, weight).double()
            assert (got - exact).abs().max() <= 1e-4 * exact.abs().max(), form.name


def test_rows_of_a_tiled_matrix_are_its_decoded_rows():
    ids = torch.tensor([0, 17, 3, 3, 49], dtype=torch.int32)
    for form in FORMATS:
        weight = held(form, values(50, 128))
        assert torch.equal(kernels.take_rows(weight, ids), weight.float()[ids.long()])
