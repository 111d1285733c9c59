"""What the rows of a step attend to: the cached positions of their own sequence, up to their own.

Rows that attend together are gathered together. Which ones is decided on the host from lengths (`runs_of`); where their
keys are is computed on the device from the block tables (`context`), once a step and not once a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Cached positions that one gather of keys and values may touch: it bounds the memory that attention works in.
POSITIONS_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class Run:
    """num_seqs sequences, from first_seq on, of num_rows rows each, from first_row on: many of one row, or one of many.

    length: positions that the longest of them sees.
    """

    first_seq: int
    num_seqs: int
    first_row: int
    num_rows: int
    length: int


@dataclass(frozen=True, slots=True)
class Context:
    """What one run attends to.

    rows: of the step. slots: [num_seqs, length] int64, where positions 0, 1, ... are cached. mask: [num_seqs, 1,
    num_rows, length] bool, which of them a row sees.
    """

    rows: slice
    slots: Tensor
    mask: Tensor


def runs_of(num_rows: Sequence[int], lengths: Sequence[int], limit: int = POSITIONS_AT_ONCE) -> list[Run]:
    """A step's sequences, cut into runs. num_rows: of each sequence. lengths: the positions that its last row sees.

    Neighbours of one row share a run while they gather at most `limit` positions, padded to the longest.
    """
    runs: list[Run] = []
    row = 0
    for seq, (rows, length) in enumerate(zip(num_rows, lengths, strict=True)):
        last = runs[-1] if runs else None
        if last is not None and last.num_rows == rows == 1 and (last.num_seqs + 1) * max(last.length, length) <= limit:
            longest = max(last.length, length)
            runs[-1] = Run(last.first_seq, last.num_seqs + 1, last.first_row, 1, longest)
        else:
            runs.append(Run(seq, 1, row, rows, length))
        row += rows
    return runs


def context(run: Run, positions: Tensor, block_tables: Tensor, block_size: int, nowhere: int) -> Context:
    """The context of a run. positions: [num_rows of the step] integers; block_tables: [num_seqs of the step, width].

    A place that none of a sequence's rows sees is read at the slot `nowhere`, so that what another request has left in
    a block, even values that are not finite, never enters a sum.
    """
    rows = slice(run.first_row, run.first_row + run.num_seqs * run.num_rows)
    places = torch.arange(run.length, device=positions.device)
    blocks = block_tables[run.first_seq : run.first_seq + run.num_seqs].index_select(1, places // block_size)
    mask = places <= positions[rows].view(run.num_seqs, run.num_rows, 1)
    seen = mask[:, -1]  # by the last row, which sees the most
    slots = torch.where(seen, blocks.long() * block_size + places % block_size, nowhere)
    return Context(rows, slots, mask[:, None])
