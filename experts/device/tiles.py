"""How the Triton kernel cuts a product into programs: a few fixed ways, chosen by shapes alone.

A program computes `rows` rows of one expert by `out` rows of its weights. The weights are the left operand of the
tensor cores, whose tile is at least 64 high, and the rows the right one, which may be 16 wide: few rows waste little.
"""

from __future__ import annotations

from dataclasses import dataclass

STEP_BYTES = 128  # of each row of weights in a step along k: 128 columns in FP8, which share a scale, 64 of 16 bits


@dataclass(frozen=True, slots=True)
class Tiles:
    """rows: of one expert, in a program. out: rows of its weights; of gate and of up each, where both are read.
    stages: steps along k in flight. warps: of a program.
    """

    rows: int
    out: int
    stages: int
    warps: int


# Decode: weights are read once and bound the time, so what counts is bytes under way. Tiles of the least height make
# the most programs, enough for all SMs of a Hopper from 4 experts of DeepSeek-V3's on, and several fit on each SM.
FEW = Tiles(rows=16, out=64, stages=4, warps=4)
# Some rows for each expert: still bound by weights, with rows enough that an expert rarely reads them twice.
SOME = Tiles(rows=64, out=64, stages=3, warps=4)
# Prefill: bound by the tensor cores; the largest tiles whose sums stay in registers. FP8 needs two sums of each output,
# that of a step until it is scaled and the total, so its rows are half as many.
MANY = Tiles(rows=128, out=128, stages=3, warps=8)
MANY_FP8 = Tiles(rows=64, out=128, stages=3, warps=8)


def all_tiles(*, fp8: bool) -> tuple[Tiles, Tiles, Tiles]:
    """Every way to cut products by weights of that kind, from few rows to many."""
    return FEW, SOME, MANY_FP8 if fp8 else MANY


def tiles_for(num_rows: int, num_experts: int, *, fp8: bool) -> Tiles:
    """By an even share of the rows: what each expert really gets is known to the device alone.

    The smallest tile that holds twice the share, since choices are uneven: an expert whose rows do not fit reads its
    weights again, from the L2 cache.
    """
    few, some, many = all_tiles(fp8=fp8)
    share = num_rows / num_experts
    return next((tiles for tiles in (few, some) if 2 * share <= tiles.rows), many)


def most_tiles(num_rows: int, num_experts: int, rows: int) -> int:
    """The most tiles of so many rows that num_rows can make, however they are spread: the grid's size is no value.

    A woken expert has one tile, and one more for each full tile of rows beyond its first row.
    """
    woken = min(num_rows, num_experts)
    return woken + (num_rows - woken) // rows
