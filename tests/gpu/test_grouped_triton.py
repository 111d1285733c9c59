"""The products in Triton equal a loop over the experts. On a GPU, or with TRITON_INTERPRET=1 on the CPU, which is how
tests/unit/test_device_triton.py runs this file.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from experts.device.products import looped_product
from experts.device.stacks import Stack, stack
from experts.device.tiles import FEW, MANY, MANY_FP8, SOME, Tiles
from experts.kernels.reference import silu_mul
from experts.kernels.weight import Fp8Weight, Weight, encode_fp8

pytest.importorskip("triton", reason="triton is not installed: CUDA builds of torch bring it")
from experts.device.grouped_triton import _product, compile_products, triton_gated_product, triton_product

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter multiplies the bits of bfloat16 as integers
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}[DTYPE]
PLAIN, FP8 = "plain", "fp8"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="no NVIDIA GPU is in reach, nor Triton's interpreter"
    ),
]
formats = pytest.mark.parametrize("form", [PLAIN, FP8])


def held(form: str, num_experts: int, heights: tuple[int, ...], width: int) -> Stack:
    """Random matrices of those heights below one another, for each expert."""
    generator = torch.Generator().manual_seed(0)

    def draw(height: int) -> Weight:
        plain = torch.randn(height, width, generator=generator) * width**-0.5
        return Fp8Weight(*encode_fp8(plain)) if form == FP8 else plain.to(DTYPE)

    matrices = [[draw(height) for height in heights] for _ in range(num_experts)]
    return stack(matrices, DEVICE, DTYPE)


def rows_of(lengths: list[int], padding: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randn(sum(lengths) + padding, width, generator=torch.Generator().manual_seed(1))
    return rows.to(DEVICE, DTYPE), torch.tensor(lengths).cumsum(0, dtype=torch.int32).to(DEVICE)


def assert_equal_to_rounding(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    assert ours.dtype is DTYPE
    torch.testing.assert_close(ours, wanted, rtol=TOLERANCE, atol=TOLERANCE)


NUM_EXPERTS = 5
LENGTHS = st.lists(st.integers(0, 20), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS)


@formats
@settings(max_examples=15, deadline=None)
@given(lengths=LENGTHS, padding=st.integers(0, 3))
def test_any_lengths(form: str, lengths: list[int], padding: int) -> None:
    weights = held(form, NUM_EXPERTS, (96,), 160)
    rows, ends = rows_of(lengths, padding, 160)
    ours, wanted = triton_product(rows, weights, ends), looped_product(rows, weights, ends)
    assert ours.shape == wanted.shape
    assert_equal_to_rounding(ours[: sum(lengths)], wanted[: sum(lengths)])


@formats
@settings(max_examples=10, deadline=None)
@given(lengths=LENGTHS)
def test_gate_and_up_at_once(form: str, lengths: list[int]) -> None:
    weights = held(form, NUM_EXPERTS, (80, 80), 160)
    rows, ends = rows_of(lengths, 0, 160)
    wanted = silu_mul(*looped_product(rows, weights, ends).chunk(2, dim=1))
    assert_equal_to_rounding(triton_gated_product(rows, weights, ends), wanted)


@formats
@pytest.mark.parametrize("lengths", [[0, 0, 300, 0], [300, 0, 0, 0], [0, 0, 0, 300], [1, 298, 0, 1]])
@pytest.mark.parametrize("tiles", [FEW, SOME, MANY, MANY_FP8])
def test_one_expert_has_nearly_all(form: str, lengths: list[int], tiles: Tiles) -> None:
    """More row tiles than walk the outputs together."""
    weights = held(form, len(lengths), (136,), 128)
    rows, ends = rows_of(lengths, 0, 128)
    assert_equal_to_rounding(triton_product(rows, weights, ends, tiles=tiles), looped_product(rows, weights, ends))


@formats
# Few of them, because each is compiled anew.
@pytest.mark.parametrize(("width", "height"), [(16, 200), (128, 1), (200, 64), (384, 127), (200, 127)])
def test_widths_and_heights_that_fill_no_tile(form: str, width: int, height: int) -> None:
    weights = held(form, 3, (height, height), width)
    rows, ends = rows_of([2, 0, 17], 0, width)
    wanted = looped_product(rows, weights, ends)
    assert_equal_to_rounding(triton_product(rows, weights, ends), wanted)
    assert_equal_to_rounding(triton_gated_product(rows, weights, ends), silu_mul(*wanted.chunk(2, dim=1)))


@formats
@pytest.mark.parametrize("num_experts", [1, 2, 33])
def test_any_number_of_experts(form: str, num_experts: int) -> None:
    weights = held(form, num_experts, (64,), 128)
    rows, ends = rows_of([3] * num_experts, 0, 128)
    assert_equal_to_rounding(triton_product(rows, weights, ends), looped_product(rows, weights, ends))


@formats
def test_no_rows_at_all(form: str) -> None:
    rows, ends = rows_of([0, 0, 0], 0, 128)
    assert triton_product(rows, held(form, 3, (64,), 128), ends).shape == (0, 64)


@formats
def test_a_row_has_the_same_bytes_whatever_the_others_are(form: str) -> None:
    weights = held(form, 4, (96, 96), 300)
    alone, ends = rows_of([0, 0, 1, 0], 0, 300)
    among, more_ends = rows_of([9, 5, 40, 3], 0, 300)
    among[14 + 21] = alone[0]
    for product in (triton_product, triton_gated_product):
        one = product(alone, weights, ends, tiles=SOME)[0]
        assert torch.equal(product(among, weights, more_ends, tiles=SOME)[14 + 21], one)


@formats
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_once_compiled_for_one_row_any_rows_and_experts_compile_nothing_more(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heights, width = (320, 320), 448  # of this test alone
    ends = torch.tensor([0, 1, 1], dtype=torch.int32, device=DEVICE)
    compile_products(rows_of([1], 0, width)[0], held(form, 3, heights, width), held(form, 3, (width,), 320), ends)
    monkeypatch.setattr(type(_product), "_do_compile", lambda *_: pytest.fail("a kernel was compiled"))
    for num_experts in (1, 2, 16, 33):
        weights = held(form, num_experts, heights, width)
        for length in (1, 20, 200):
            rows, more_ends = rows_of([length] * num_experts, 0, width)
            triton_gated_product(rows, weights, more_ends)


@formats
@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no CUDA graphs")
def test_a_replayed_graph_follows_the_ends_on_the_device(form: str) -> None:
    weights = held(form, 4, (256, 256), 512)
    rows, ends = rows_of([5, 0, 3, 8], 0, 512)
    triton_gated_product(rows, weights, ends)  # compiled, which a graph may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = triton_gated_product(rows, weights, ends)
    ends.copy_(torch.tensor([0, 12, 12, 16]))
    graph.replay()
    assert_equal_to_rounding(ours, silu_mul(*looped_product(rows, weights, ends).chunk(2, dim=1)))
