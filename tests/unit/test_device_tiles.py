"""How the Triton kernel cuts its work: enough programs for any spread of the rows, whatever it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.device.tiles import FEW, MANY, MANY_FP8, SOME, Tiles, most_tiles, tiles_for

LENGTHS = st.lists(st.integers(0, 300), min_size=1, max_size=40)
TILES = st.sampled_from([1, 16, 64, 128])


@given(lengths=LENGTHS, rows=TILES)
def test_no_spread_of_the_rows_needs_more_tiles(lengths: list[int], rows: int) -> None:
    assert sum(-(-length // rows) for length in lengths) <= most_tiles(sum(lengths), len(lengths), rows)


@given(num_rows=st.integers(0, 3000), num_experts=st.integers(1, 300), rows=TILES)
def test_one_spread_of_the_rows_needs_as_many(num_rows: int, num_experts: int, rows: int) -> None:
    woken = min(num_rows, num_experts)
    lengths = [1] * woken
    if woken:
        lengths[0] += num_rows - woken
    assert sum(-(-length // rows) for length in lengths) == most_tiles(num_rows, num_experts, rows)


@pytest.mark.parametrize(
    ("num_rows", "fp8", "tiles"),
    [(1, False, FEW), (2048, True, FEW), (2049, True, SOME), (8192, False, SOME), (8193, False, MANY),
     (8193, True, MANY_FP8)],
)  # fmt: skip
def test_more_rows_take_larger_tiles(num_rows: int, fp8: bool, tiles: Tiles) -> None:
    assert tiles_for(num_rows, 256, fp8=fp8) is tiles
