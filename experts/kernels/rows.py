"""The two halves of `moe`, for experts that other processes hold: the expert rows, and their weighted sum.

combine_rows over expert_rows gives the bytes of `moe`, whichever tables the rows of a token come from.
"""

from __future__ import annotations

from typing import overload

import numpy as np
import torch
from torch import Tensor

from experts.kernels import reference_rows
from experts.kernels.addresses import address_of
from experts.kernels.dtypes import DTYPES
from experts.kernels.expert_table import ExpertTable
from experts.kernels.library import current

_INT64 = np.dtype(np.int64)


@overload
def expert_rows(
    hidden_states: Tensor, topk_ids: Tensor, experts: ExpertTable, *, out: Tensor | None = None
) -> Tensor: ...


@overload
def expert_rows(hidden_states: Tensor, topk_ids: Tensor, experts: ExpertTable, *, out: int) -> int: ...


def expert_rows(
    hidden_states: Tensor, topk_ids: Tensor, experts: ExpertTable, *, out: Tensor | int | None = None
) -> Tensor | int:
    """The row down(silu(gate(x)) * up(x)) of every pair (token, chosen expert), rounded as in `moe`, not weighted.

    hidden_states: [n, hidden] in the table's dtype; it may lie in shared memory.
    topk_ids: [n, k] int32, contiguous, -1 for none.
    out: where the rows go: a contiguous tensor [n * k, hidden] of hidden_states' dtype, or the address of as much room
    as they need.
    Returns rows [num_pairs, hidden] in order of (token, place in the top-k); with an address, num_pairs.
    Raises KeyError, with nothing written, when an id is out of range or names an expert that the table does not hold.
    """
    if isinstance(out, int):
        return _write_expert_rows(hidden_states, topk_ids, experts, out)
    shape = (topk_ids.numel(), hidden_states.shape[1])
    if out is None:
        out = torch.empty(shape, dtype=hidden_states.dtype)
    assert out.dtype is hidden_states.dtype
    assert out.shape == shape
    assert out.is_contiguous()
    return out[: _write_expert_rows(hidden_states, topk_ids, experts, out.data_ptr())]


def _write_expert_rows(hidden_states: Tensor, topk_ids: Tensor, experts: ExpertTable, address: int) -> int:
    functions = current()
    if functions is None:
        return reference_rows.write_expert_rows(hidden_states, topk_ids, experts, address)
    num_tokens, hidden_size = hidden_states.shape
    assert hidden_states.dtype is experts.dtype
    assert hidden_states.stride(1) == 1
    assert hidden_size == experts.hidden_size
    assert topk_ids.dtype is torch.int32
    assert topk_ids.shape[0] == num_tokens
    assert topk_ids.is_contiguous()
    num_pairs: int = functions.bk_expert_rows(
        hidden_states.data_ptr(),
        hidden_states.stride(0),
        topk_ids.data_ptr(),
        experts.gate,
        experts.up,
        experts.down,
        address,
        num_tokens,
        topk_ids.shape[1],
        experts.num_experts,
        hidden_size,
        experts.intermediate_size,
        experts.code,
        DTYPES[experts.dtype],
    )
    if num_pairs < 0:
        raise experts.not_held_error(topk_ids)
    return num_pairs


def combine_rows(
    addresses: np.ndarray, topk_weights: Tensor, hidden_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The weighted sum of each token's expert rows, exactly as inside `moe`.

    addresses: [n, k] int64, where each pair's row [hidden_size] of `dtype` (float32 or bfloat16) is, 0 for none; the
    caller keeps the rows alive. topk_weights: [n, k] float32, contiguous.
    Returns rows [n, hidden_size] and failed [n] bool: a row in which anything is not finite is zeros.
    """
    functions = current()
    if functions is None:
        return reference_rows.combine_rows(addresses, topk_weights, hidden_size, dtype)
    num_tokens, top_k = addresses.shape
    rows = torch.empty((num_tokens, hidden_size), dtype=dtype)
    failed = torch.empty(num_tokens, dtype=torch.bool)
    assert addresses.dtype == _INT64
    assert topk_weights.dtype is torch.float32
    assert topk_weights.shape == addresses.shape
    assert topk_weights.is_contiguous()
    functions.bk_combine_rows(
        address_of(addresses),
        topk_weights.data_ptr(),
        rows.data_ptr(),
        failed.data_ptr(),
        num_tokens,
        top_k,
        hidden_size,
        DTYPES[dtype],
    )
    return rows, failed


def find_nonfinite(address: int, num_pairs: int, hidden_size: int, dtype: torch.dtype) -> np.ndarray:
    """Which of the rows at an address hold an infinity or a NaN: [num_pairs] bool.

    The rows are [num_pairs, hidden_size] of `dtype`, float32 or bfloat16, contiguous.
    """
    functions = current()
    if functions is None:
        return reference_rows.find_nonfinite(address, num_pairs, hidden_size, dtype)
    nonfinite = np.empty(num_pairs, np.bool_)
    functions.bk_find_nonfinite(address, address_of(nonfinite), num_pairs, hidden_size, DTYPES[dtype])
    return nonfinite
