"""What one step computes, as flat tensors: tokens of many sequences side by side, no padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """num_tokens rows of num_seqs sequences; a sequence's rows are consecutive and in order.

    token_ids, positions, seq_ids, slots: [num_tokens] int32. slots: where the row's keys and values are kept,
    block * block_size + offset. block_tables: [num_seqs, max_blocks] int32, by seq_ids. sample_rows: [num_samples]
    int64, the rows whose logits are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    seq_ids: torch.Tensor
    slots: torch.Tensor
    block_tables: torch.Tensor
    sample_rows: torch.Tensor
