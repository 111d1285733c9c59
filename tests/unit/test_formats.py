"""Formats of few bits: what an encoding may lose, what it must keep, and that C++ and numpy write the same bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from barista.errors import CheckpointError
from experts import kernels
from experts.formats import FP8, INT4, INT8, MXFP4, Q4_0, Q8_0, TILED, Format
from experts.formats.codec import decode, encode, exponent_values, from_ggml, scale8_values
from tests.kernel_variants import few, values, variant  # noqa: F401 (a fixture)

ENCODED = [INT8, INT4, MXFP4]
shapes = st.tuples(st.integers(1, 40), st.integers(1, 4).map(lambda groups: 64 * groups))
by_name = pytest.mark.parametrize("form", ENCODED, ids=lambda form: form.name)


def weights(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Rows of very different sizes, some of them zero."""
    w = values(*shape, seed=seed) * values(shape[0], 1, seed=seed + 1).exp() / 50
    w[::5] = 0
    return w


@few
@given(shape=shapes, seed=st.integers(0, 1000))
@by_name
def test_the_kernels_encode_and_decode_as_numpy_does(variant: str, form: Format, shape: tuple[int, int], seed: int):  # noqa: F811
    w = weights(shape, seed)
    packed = kernels.encode(form, w)
    assert np.array_equal(packed.numpy(), encode(form, w.numpy()))
    decoded = kernels.TiledWeight(form, shape, packed).float()
    assert np.array_equal(decoded.numpy(), decode(form, packed.numpy(), shape))


@few
@given(shape=shapes, seed=st.integers(0, 1000))
def test_int8_is_within_a_step_and_a_half_of_the_weights(shape: tuple[int, int], seed: int):
    w = weights(shape, seed)
    error = (torch.from_numpy(decode(INT8, encode(INT8, w.numpy()), shape)) - w).view(shape[0], -1, 64).abs()
    step = w.view(shape[0], -1, 64).abs().amax(-1, keepdim=True) / 127
    assert (error <= 1.5 * step * (1 + 2**-10) + w.abs().max() * 2**-24).all()  # where float16 scales end


@pytest.mark.parametrize("tail", ["normal", "laplace"])
def test_int4_loses_less_than_ggmls_q4_0(tail: str):
    """At 4.25 bits a weight against 4.5."""
    w = values(64, 512)
    w = (w if tail == "normal" else w.sign() * w.abs().exp()).numpy()
    ours = decode(INT4, encode(INT4, w), (64, 512))
    theirs = gguf.dequantize(gguf.quantize(w, gguf.GGMLQuantizationType.Q4_0), gguf.GGMLQuantizationType.Q4_0)
    assert ((ours - w) ** 2).sum() < ((theirs.reshape(64, 512) - w) ** 2).sum()


@by_name
def test_what_a_format_holds_it_keeps(form: Format):
    shape = (20, 128)
    w = decode(form, encode(form, weights(shape, 3).numpy()), shape)
    again = decode(form, encode(form, w), shape)
    assert ((again - w) ** 2).sum() <= 1e-6 * (w**2).sum()


@by_name
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e4, 1e30])
def test_weights_of_any_size_keep_their_signs_or_are_near_zero(form: Format, size: float):
    w = np.float32(size) * weights((16, 64), 1).numpy()
    decoded = decode(form, encode(form, w), (16, 64))
    assert np.isfinite(decoded).all()
    assert np.abs(decoded - w).max() <= 0.2 * np.abs(w).max()


@pytest.mark.parametrize(("form", "ggml"), [(Q8_0, "Q8_0"), (Q4_0, "Q4_0")], ids=["q8_0", "q4_0"])
def test_ggmls_blocks_are_kept_without_loss(form: Format, ggml: str):
    kind = gguf.GGMLQuantizationType[ggml]
    blocks = gguf.quantize(values(37, 192).numpy(), kind)
    tiles = from_ggml(form, blocks)
    assert tiles.nbytes == form.nbytes((37, 192))
    assert np.array_equal(decode(form, tiles, (37, 192)), gguf.dequantize(blocks, kind))
    kept = kernels.TiledWeight(form, (37, 192), torch.from_numpy(tiles))
    assert np.array_equal(kept.float().numpy(), gguf.dequantize(blocks, kind))


def test_mxfp4_decodes_as_ggmls_mxfp4():
    """gguf's dequantize is the oracle: the same nibbles and exponents."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (16, 4, 17), np.uint8)
    blocks[..., 0] = rng.integers(100, 150, (16, 4))
    expected = gguf.dequantize(blocks.reshape(16, -1), gguf.GGMLQuantizationType.MXFP4)
    decoded = decode(MXFP4, encode(MXFP4, expected), (16, 128))
    assert np.array_equal(decoded, expected)


def test_the_scales_are_those_of_their_standards():
    codes = np.arange(255, dtype=np.uint8)
    assert np.array_equal(exponent_values(codes), np.exp2(codes.astype(np.float64) - 127).astype(np.float32))
    e4m3 = torch.arange(256, dtype=torch.uint8)[:127].view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(scale8_values(codes[:127]) * 256, e4m3)
    assert np.array_equal(scale8_values(codes[:127] | 128), -scale8_values(codes[:127]))


@pytest.mark.parametrize("form", [*TILED.values()], ids=lambda form: form.name)
def test_inputs_that_do_not_divide_are_refused_by_name(form: Format):
    with pytest.raises(CheckpointError, match=r"\[16, 100\] cannot be held as " + form.name) as refused:
        form.nbytes((16, 100))
    assert "bf16" in refused.value.remedy
    assert FP8.takes((16, 100))


@few
@given(out=st.integers(1, 300), inputs=st.integers(1, 300))
def test_fp8_is_within_a_sixteenth_of_each_weight(out: int, inputs: int):
    w = weights((out, inputs), out)
    held = kernels.Fp8Weight(*kernels.encode_fp8(w)).float()
    assert ((held - w).abs() <= w.abs() / 16 + w.abs().max() * 2**-9 / 448).all()
