"""Products of rows that are sorted by expert, in Triton. Weights are read as they lie, in the rows' dtype or in FP8.

out[row] = weights[expert of row] @ row, summed in float32 and rounded once to the rows' dtype, bfloat16 or float16.
Both hold every FP8 value exactly, so FP8 is multiplied as it is, and the sum of each 128 columns is scaled in float32:
nothing is dequantised to memory.

A row's bytes depend on its input, its expert and the tiles (tiles.py), not on the other rows: k is walked in one order
by one program, without atomics, and a row is a column of the product that no other column touches.

Which rows a program computes it finds in `ends` on the device. The grid is as large as any spread of the rows could
need; programs past the last tile return. So nothing waits for the host, and a call may be part of a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from experts.device.stacks import Fp8Stack, Stack
from experts.device.tiles import STEP_BYTES, Tiles, all_tiles, most_tiles, tiles_for
from experts.formats.formats import FP8_BLOCK

_EXPERTS = 256  # the least that a kernel is compiled for: it also does for fewer, so that experts may come and go
_SCALE_COLUMNS = tl.constexpr(FP8_BLOCK)
_GROUP = tl.constexpr(8)  # row tiles of an expert that walk its weights together: what they share stays in L2


def triton_product(rows: Tensor, weights: Stack, ends: Tensor, *, tiles: Tiles | None = None) -> Tensor:
    """Each expert's rows by its matrix. rows: [num_rows, in], contiguous; ends: as of DeviceExperts.

    Returns [num_rows, out] in the rows' dtype; rows from ends[-1] on are undefined. tiles: by default those of
    tiles_for.
    """
    return _launch(rows, weights, ends, tiles, gated=False)


def triton_gated_product(rows: Tensor, weights: Stack, ends: Tensor, *, tiles: Tiles | None = None) -> Tensor:
    """silu(gate) * up of each expert's rows, where gate lies above up in its [2 * intermediate, in]. As triton_product.

    Gate, up, silu and the product are each rounded, as in kernels.silu_mul. Returns [num_rows, intermediate].
    """
    return _launch(rows, weights, ends, tiles, gated=True)


def compile_products(rows: Tensor, gate_up: Stack, down: Stack, ends: Tensor) -> None:
    """Compile all that both products of a layer may need for any number of rows, or of experts up to _EXPERTS.

    So nothing is compiled while others wait for a step. rows: [1, hidden].
    """
    for tiles in all_tiles(fp8=isinstance(gate_up, Fp8Stack)):
        triton_gated_product(rows, gate_up, ends, tiles=tiles)
    for tiles in all_tiles(fp8=isinstance(down, Fp8Stack)):
        triton_product(rows.new_zeros(1, down.values.shape[2]), down, ends, tiles=tiles)


def _launch(rows: Tensor, weights: Stack, ends: Tensor, tiles: Tiles | None, *, gated: bool) -> Tensor:
    num_rows, num_experts = len(rows), len(ends)
    fp8 = isinstance(weights, Fp8Stack)
    tiles = tiles or tiles_for(num_rows, num_experts, fp8=fp8)
    height = weights.out_features // 2 if gated else weights.out_features
    out = rows.new_empty(num_rows, height)
    if not num_rows:
        return out
    grid = (most_tiles(num_rows, num_experts, tiles.rows) * triton.cdiv(height, tiles.out),)
    with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
        _product[grid](
            rows,
            weights.values,
            weights.scales if isinstance(weights, Fp8Stack) else None,
            ends,
            out,
            num_experts,
            EXPERTS=max(_EXPERTS, triton.next_power_of_2(num_experts)),
            WIDTH=rows.shape[1],
            HEIGHT=height,
            GATED=gated,
            SCALE_ROWS=weights.rows_per_scale if isinstance(weights, Fp8Stack) else 0,
            TILE_ROWS=tiles.rows,
            TILE_OUT=tiles.out,
            STEP=STEP_BYTES // weights.values.itemsize,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            enable_fp_fusion=True,
        )
    return out


@triton.jit(do_not_specialize=["num_experts"])
def _product(
    rows_ptr: tl.tensor, values_ptr: tl.tensor, scales_ptr: tl.tensor, ends_ptr: tl.tensor, out_ptr: tl.tensor,
    num_experts: tl.tensor, EXPERTS: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr, GATED: tl.constexpr,
    SCALE_ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_OUT: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """One tile, [TILE_OUT, TILE_ROWS]: weights times rows, which stand upright.

    out [num_rows, HEIGHT], rows [num_rows, WIDTH], ends [num_experts] int32; EXPERTS: a power of two, num_experts or
    more. GATED: HEIGHT rows of up lie below as many of gate. SCALE_ROWS: rows that share a scale, 0 for plain weights.
    """
    expert, row_tile, out_tile, first, end = _find_tile(
        ends_ptr, num_experts, tl.cdiv(HEIGHT, TILE_OUT), EXPERTS, TILE_ROWS
    )
    if expert >= num_experts:
        return
    row = (first + row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(tl.int64)
    out = out_tile * TILE_OUT + tl.arange(0, TILE_OUT)
    mine, inside = row < end, out < HEIGHT

    height: tl.constexpr = 2 * HEIGHT if GATED else HEIGHT
    values_ptr += expert.to(tl.int64) * (height * WIDTH)
    if SCALE_ROWS:
        scales_ptr += expert * (height // SCALE_ROWS * tl.cdiv(WIDTH, _SCALE_COLUMNS))
    total = tl.zeros([TILE_OUT, TILE_ROWS], tl.float32)
    up = tl.zeros([TILE_OUT, TILE_ROWS], tl.float32)
    for start in range(0, WIDTH, STEP):
        column = start + tl.arange(0, STEP)
        at = rows_ptr + row[None, :] * WIDTH + column[:, None]
        upright = tl.load(at, mask=mine[None, :] & (column < WIDTH)[:, None], other=0.0)
        total = _add(total, upright, values_ptr, scales_ptr, out, inside, start, WIDTH, SCALE_ROWS, STEP)
        if GATED:
            up = _add(up, upright, values_ptr, scales_ptr, HEIGHT + out, inside, start, WIDTH, SCALE_ROWS, STEP)
    dtype = out_ptr.dtype.element_ty
    result = total.to(dtype)
    if GATED:
        gate = result.to(tl.float32)
        silu = (gate / (1 + tl.exp(-gate))).to(dtype)
        result = (silu.to(tl.float32) * up.to(dtype).to(tl.float32)).to(dtype)
    tl.store(out_ptr + row[None, :] * HEIGHT + out[:, None], result, mask=mine[None, :] & inside[:, None])


@triton.jit
def _add(
    total: tl.tensor, upright: tl.tensor, values_ptr: tl.tensor, scales_ptr: tl.tensor, out: tl.tensor,
    inside: tl.tensor, start: tl.tensor, WIDTH: tl.constexpr, SCALE_ROWS: tl.constexpr, STEP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """total, and STEP columns of the weights' rows `out` times the rows that stand upright."""
    column = start + tl.arange(0, STEP)
    at = values_ptr + out[:, None] * WIDTH + column[None, :]
    weights = tl.load(at, mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)
    if SCALE_ROWS:
        scale_at = scales_ptr + out // SCALE_ROWS * tl.cdiv(WIDTH, _SCALE_COLUMNS) + start // _SCALE_COLUMNS
        scale = tl.load(scale_at, mask=inside, other=0.0)
        exact = weights.to(tl.float32).to(upright.dtype)  # straight to bf16 is one slow instruction for each
        total += tl.dot(exact, upright) * scale[:, None]
    else:
        total = tl.dot(weights, upright, total)
    return total


@triton.jit
def _find_tile(
    ends_ptr: tl.tensor, num_experts: tl.tensor, out_tiles: tl.tensor, EXPERTS: tl.constexpr, TILE_ROWS: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """What this program computes: expert, row tile, tile of outputs, and the expert's first row and end.

    An expert's programs are neighbours, and up to _GROUP of its row tiles walk the tiles of outputs together. The
    expert is EXPERTS for programs that have nothing to do.
    """
    experts = tl.arange(0, EXPERTS)
    known = experts < num_experts
    ends = tl.load(ends_ptr + experts, mask=known, other=0)
    firsts = tl.load(ends_ptr + experts - 1, mask=known & (experts > 0), other=0)
    tiles = tl.where(known, tl.cdiv(ends - firsts, TILE_ROWS), 0)
    program = tl.program_id(0)
    before = tl.cumsum(tiles, 0) * out_tiles <= program
    expert = tl.sum(before.to(tl.int32), 0)
    own = experts == expert
    row_tiles = tl.sum(tl.where(own, tiles, 0), 0)
    program -= tl.sum(tl.where(before, tiles, 0), 0) * out_tiles
    group, within = program // (_GROUP * out_tiles), program % (_GROUP * out_tiles)
    together = tl.maximum(tl.minimum(row_tiles - group * _GROUP, _GROUP), 1)
    row_tile, out_tile = group * _GROUP + within % together, within // together
    return expert, row_tile, out_tile, tl.sum(tl.where(own, firsts, 0), 0), tl.sum(tl.where(own, ends, 0), 0)
