"""experts.kernels.rows in plain torch: the slow oracle of the tests, and the stand-in where nothing can be compiled."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from experts.kernels.expert_table import ExpertTable
from experts.kernels.reference import linear, silu_mul


def write_expert_rows(hidden_states: Tensor, topk_ids: Tensor, experts: ExpertTable, address: int) -> int:
    """See experts.kernels.expert_rows with an address."""
    if experts.not_held(topk_ids):
        raise experts.not_held_error(topk_ids)
    ids = topk_ids[topk_ids >= 0]
    tokens = (topk_ids >= 0).nonzero()[:, 0]
    rows = torch.empty((len(ids), experts.hidden_size), dtype=hidden_states.dtype)
    for expert in set(ids.tolist()):
        gate, up, down = experts[expert]
        pairs = ids == expert
        x = hidden_states[tokens[pairs]]
        rows[pairs] = linear(silu_mul(linear(x, gate), linear(x, up)), down)
    ctypes.memmove(address, rows.data_ptr(), rows.nbytes)
    return len(rows)


def combine_rows(
    addresses: np.ndarray, topk_weights: Tensor, hidden_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See experts.kernels.combine_rows."""
    total = torch.zeros((len(addresses), hidden_size))
    for token, place in zip(*addresses.nonzero(), strict=True):
        row = _rows_at(int(addresses[token, place]), 1, hidden_size, dtype)[0]
        total[token] += row.float() * topk_weights[token, place]
    result = total.to(dtype)
    failed = ~result.isfinite().all(-1)
    return result.masked_fill_(failed[:, None], 0), failed


def find_nonfinite(address: int, num_pairs: int, hidden_size: int, dtype: torch.dtype) -> np.ndarray:
    """See experts.kernels.find_nonfinite."""
    rows = _rows_at(address, num_pairs, hidden_size, dtype)
    return (~rows.isfinite().all(-1)).numpy()


def _rows_at(address: int, num_rows: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """A copy of the rows [num_rows, hidden_size] at an address."""
    rows = torch.empty((num_rows, hidden_size), dtype=dtype)
    ctypes.memmove(rows.data_ptr(), address, rows.nbytes)
    return rows
