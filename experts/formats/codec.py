"""Tiles in numpy: the slow oracle of experts/kernels/src/encode.cpp, and what rearranges ggml's blocks. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from experts.formats.formats import (
    HEADER_BYTES,
    INT4,
    INT8,
    MXFP4,
    Q8_0,
    TILE_INPUTS,
    TILE_ROWS,
    Format,
)

# Twice the values of E2M1 (OCP Microscaling Formats 1.0).
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


def encode(form: Format, weight: np.ndarray) -> np.ndarray:
    """[out, in] float32, finite -> the packed bytes, uint8 [form.nbytes].

    Each group of inputs takes the scale that leaves the least squared error among those tried: for int8 four a little
    below largest / 127, for int4 neighbours of largest / 8 of either sign, for mxfp4 the two exponents around the
    largest (OCP MX 1.0, 6.3). Raises CheckpointError for a shape that the format cannot take.
    """
    form.check(weight.shape)
    rows = _padded(weight)
    header = _matrix_scale(form, weight)
    if form is INT8:
        groups = _groups(rows, TILE_INPUTS)
        largest = np.abs(groups).max(-1)
        codes = np.stack([(largest / header / np.float32(127 + i / 2)).astype(np.float16) for i in range(4)])
        code, integers = _best(
            groups / header, codes, codes.astype(np.float32), lambda v: np.rint(np.clip(v, -127, 127))
        )
        return _tiles8(header, integers, code.view(np.uint8))
    groups = _groups(rows, TILE_INPUTS // 2)
    largest = np.abs(groups).max(-1)
    if form is INT4:
        codes = _scale8_candidates(largest, header)
        values = scale8_values(codes)
        code, integers = _best(groups / header, codes, values, lambda v: np.rint(np.clip(v, -8, 7)))
        return _tiles4(header, (integers + 8).astype(np.uint8), code)
    assert form is MXFP4
    exponents = np.frexp(largest)[1] + 127 - 3
    codes = np.stack([np.where(largest == 0, 127, np.clip(exponents + i, 2, 254)).astype(np.uint8) for i in range(2)])
    code, integers = _best(groups, codes, exponent_values(codes) / np.float32(2), _nearest_e2m1)
    return _tiles4(header, _e2m1_codes(integers), code)


def decode(form: Format, packed: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The packed bytes -> float32 [out, in]."""
    out, in_features = shape
    header = packed[:4].view(np.float32)[0]
    tiles = packed[HEADER_BYTES:].reshape(-1, in_features // TILE_INPUTS, form.tile_bytes)
    strips, columns = tiles.shape[:2]
    if form in (INT8, Q8_0):
        values = tiles[..., :1024].view(np.int8).reshape(strips, columns, 16, TILE_ROWS, 4)
        integers = values.transpose(0, 3, 1, 2, 4).reshape(strips * TILE_ROWS, -1).astype(np.float32)
    else:
        nibbles = tiles[..., :512].reshape(strips, columns, 8, TILE_ROWS, 4)
        halves = np.stack([nibbles & 15, nibbles >> 4], axis=2)
        codes = halves.transpose(0, 4, 1, 2, 3, 5).reshape(strips * TILE_ROWS, -1)
        integers = (E2M1[codes] if form is MXFP4 else codes.astype(np.int8) - 8).astype(np.float32)
    integer_bytes = 1024 if form in (INT8, Q8_0) else 512
    scales = _scales(form, np.ascontiguousarray(tiles[..., integer_bytes:])).reshape(strips, columns, -1, TILE_ROWS)
    per_scale = TILE_INPUTS // scales.shape[2]
    by_row = scales.transpose(0, 3, 1, 2).reshape(strips * TILE_ROWS, -1) * header
    weight: np.ndarray = (integers * by_row.repeat(per_scale, axis=1))[:out]
    return weight


def _scales(form: Format, codes: np.ndarray) -> np.ndarray:
    """The bytes behind a tile's integers -> float32."""
    if form is INT4:
        return scale8_values(codes)
    if form is MXFP4:
        return exponent_values(codes) / np.float32(2)
    return codes.view(np.float16).astype(np.float32)


def from_ggml(form: Format, blocks: np.ndarray) -> np.ndarray:
    """Rows of ggml's block_q8_0 or block_q4_0, uint8 [out, bytes], as tiles that hold the same values."""
    size = 34 if form is Q8_0 else 18
    out = len(blocks)
    rows = np.zeros((-(-out // TILE_ROWS) * TILE_ROWS, blocks.shape[1]), np.uint8)
    rows[:out] = blocks
    grouped = rows.reshape(len(rows), -1, size)
    scales = np.ascontiguousarray(grouped[..., :2])
    if form is Q8_0:
        return _tiles8(np.float32(1), grouped[..., 2:].view(np.int8), scales)
    low, high = grouped[..., 2:] & 15, grouped[..., 2:] >> 4
    return _tiles4(np.float32(1), np.concatenate([low, high], axis=-1), scales)


def scale8_values(codes: np.ndarray) -> np.ndarray:
    """The values of int4's scales, relative to the matrix's: 2^-8 times e4m3 without its NaN."""
    bits = (codes.astype(np.uint16) & 0x7F) << 7 | (codes.astype(np.uint16) & 0x80) << 8
    return bits.view(np.float16).astype(np.float32)


def exponent_values(codes: np.ndarray) -> np.ndarray:
    """2^(code - 127) (E8M0); NaN for 255."""
    values = np.ldexp(np.float32(1), codes.astype(np.int32) - 127)
    return np.where(codes == 255, np.float32(math.nan), values).astype(np.float32)


def _padded(weight: np.ndarray) -> np.ndarray:
    rows = np.zeros((-(-weight.shape[0] // TILE_ROWS) * TILE_ROWS, weight.shape[1]), np.float32)
    rows[: weight.shape[0]] = weight
    return rows


def _groups(rows: np.ndarray, size: int) -> np.ndarray:
    """[rows, in] -> [rows, groups, size]."""
    return rows.reshape(len(rows), -1, size)


def _matrix_scale(form: Format, weight: np.ndarray) -> np.float32:
    """The power of two that brings the largest scale of the matrix below what its codes can be."""
    top = np.abs(weight).max() if weight.size else np.float32(0)
    if form is MXFP4 or not top:
        return np.float32(1)
    largest_scale = np.float32(1) / np.float32(127)
    if form is INT4:
        largest_scale = np.float32(1) / np.float32(8) * np.float32(1.25) / np.float32(1.875)
    scale: np.float32 = np.ldexp(np.float32(1), np.frexp(np.float32(top) * largest_scale)[1])
    return scale


def _scale8_candidates(largest: np.ndarray, matrix_scale: np.float32) -> np.ndarray:
    half = (largest / (np.float32(8) * matrix_scale)).astype(np.float16).view(np.uint16).astype(np.int32)
    nearest = (half + 0x3F + (half >> 7 & 1)) >> 7
    tries = [np.clip(nearest + step, 0, 127) | sign << 7 for step in range(-4, 3) for sign in (0, 1)]
    return np.stack(tries).astype(np.uint8)


def _best(
    groups: np.ndarray, codes: np.ndarray, values: np.ndarray, integer: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The code of each group's best scale, the first of equals, and the group's integers with it."""
    best_error = np.full(groups.shape[:2], np.inf, np.float32)
    best_code = np.zeros(groups.shape[:2], codes.dtype)
    best_integers = np.zeros(groups.shape, np.float32)
    for index, (code, scale) in enumerate(zip(codes, values, strict=True)):
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
        integers = integer(groups * inverse[..., None])
        error = np.zeros(groups.shape[:2], np.float32)
        with np.errstate(over="ignore"):
            for i in range(groups.shape[2]):  # in this order, as the kernel adds
                difference = groups[..., i] - integers[..., i] * scale
                error = error + difference * difference
        better = error < best_error if index else np.ones_like(error, bool)
        best_error = np.where(better, error, best_error)
        best_code = np.where(better, code, best_code)
        best_integers = np.where(better[..., None], integers, best_integers)
    return best_code, best_integers


def _nearest_e2m1(values: np.ndarray) -> np.ndarray:
    """Twice the nearest value of E2M1, ties to the even mantissa."""
    a = np.abs(values)
    whole = np.select([a < 4.5, a <= 5, a < 7, a <= 10], [np.rint(np.minimum(a, 4)), 4, 6, 8], 12)
    nearest: np.ndarray = np.where(values < 0, -whole, whole).astype(np.float32)
    return nearest


def _e2m1_codes(integers: np.ndarray) -> np.ndarray:
    codes = np.searchsorted(E2M1[:8], np.abs(integers)).astype(np.uint8)
    signed: np.ndarray = np.where(integers < 0, codes | 8, codes).astype(np.uint8)
    return signed


def _tiles8(header: np.float32, integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """integers: [rows, groups, size]; scales: [rows, groups x 2] bytes of float16."""
    strips = len(integers) // TILE_ROWS
    values = integers.astype(np.int8).reshape(strips, TILE_ROWS, -1, 16, 4).transpose(0, 2, 3, 1, 4)
    return _joined(header, values.reshape(strips, values.shape[1], -1).view(np.uint8), scales)


def _tiles4(header: np.float32, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """codes: [rows, groups, 32] below 16; scales: [rows, groups, bytes of one]."""
    strips = len(codes) // TILE_ROWS
    halves = codes.reshape(strips, TILE_ROWS, -1, 2, 8, 4)
    nibbles = (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).transpose(0, 2, 3, 1, 4)
    return _joined(header, nibbles.reshape(strips, nibbles.shape[1], -1), scales)


def _joined(header: np.float32, tiles: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """tiles: [strips, columns, bytes]; scales: of each row, group after group."""
    strips, columns = tiles.shape[:2]
    rows = scales.reshape(strips * TILE_ROWS, -1)
    size = 1 if rows.shape[1] == 2 * columns and tiles.shape[2] == 512 else 2
    by_tile = rows.reshape(strips, TILE_ROWS, columns, -1, size).transpose(0, 2, 3, 1, 4)
    body = np.concatenate([tiles, by_tile.reshape(strips, columns, -1)], axis=-1)
    first = np.zeros(HEADER_BYTES, np.uint8)
    first[:4] = np.frombuffer(np.float32(header).tobytes(), np.uint8)
    return np.concatenate([first, body.reshape(-1)])
