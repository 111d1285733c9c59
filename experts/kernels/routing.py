"""Which worker computes which expert of a batch, and the lists that go to each worker and come back.

These run between the gate and the experts of every layer, so they are compiled and take arrays as they are.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from experts.kernels import reference_routing
from experts.kernels.addresses import address_of
from experts.kernels.library import current

_INT32, _INT64, _FLOAT32 = np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.float32)


def route(topk_ids: Tensor | np.ndarray, replicas: np.ndarray, cost: np.ndarray, expert_cost: float) -> np.ndarray:
    """For each expert that a batch asks for, the one of its holders that computes it.

    An expert with one holder goes there. Then the others go, most rows first, each to the holder that would finish
    first with it: scheduling by longest processing time, on workers of unequal speed. An expert of r rows takes a
    worker w (expert_cost + r) * cost[w]. Ties go to the lower expert and the lower worker, so that equal arguments give
    equal results.

    topk_ids: [n, k] int32, -1 for none; replicas: [num_experts, R] int32, the workers that hold each, -1 for none;
    cost: [num_workers] float32, more than 0, infinite for a worker that shall serve only what nobody else holds;
    expert_cost: what reading an expert's weights takes, in rows. All contiguous.
    Returns owner [num_experts] int32: a worker, -1 where nobody asks, -2 where somebody asks and nobody holds.
    Raises ValueError when an id or a worker is out of range.
    """
    functions = current()
    if functions is None:
        return reference_routing.route(topk_ids, replicas, cost, expert_cost)
    num_experts, num_replicas = replicas.shape
    assert replicas.dtype == _INT32
    assert cost.dtype == _FLOAT32
    owner = np.empty(num_experts, _INT32)
    ids, num_tokens, top_k = _topk_ids(topk_ids)
    status = functions.bk_route(
        ids,
        num_tokens * top_k,
        address_of(replicas),
        num_experts,
        num_replicas,
        address_of(cost),
        len(cost),
        expert_cost,
        address_of(owner),
    )
    if status != 0:
        raise ValueError(f"an expert is not among {num_experts}, or a worker not among {len(cost)}")
    return owner


def split(topk_ids: Tensor | np.ndarray, owner: np.ndarray, worker: int) -> tuple[np.ndarray, np.ndarray, int]:
    """One worker's part of a batch: the pairs (token, place in the top-k) of the experts that it owns.

    topk_ids: [n, k] int32, -1 for none; owner: [num_experts] int32, of `route`; contiguous.
    Returns tokens [m] int32, those that have any such pair, ascending; ids [m, k] int32, theirs, -1 for all other
    places; and the number of pairs. Raises ValueError when an id is out of range.
    """
    functions = current()
    if functions is None:
        return reference_routing.split(topk_ids, owner, worker)
    assert owner.dtype == _INT32
    address, num_tokens, top_k = _topk_ids(topk_ids)
    tokens = np.empty(num_tokens, _INT32)
    ids = np.empty((num_tokens, top_k), _INT32)
    num_pairs = ctypes.c_int64()
    m = functions.bk_split(
        address,
        num_tokens,
        top_k,
        address_of(owner),
        len(owner),
        worker,
        address_of(tokens),
        address_of(ids),
        ctypes.byref(num_pairs),
    )
    if m < 0:
        raise ValueError(f"an expert is not among {len(owner)}")
    return tokens[:m], ids[:m], num_pairs.value


def place_rows(addresses: np.ndarray, tokens: np.ndarray, ids: np.ndarray, base: int, row_bytes: int) -> int:
    """Write down where the rows of one worker's answer are: the way back of `split`, on the way to `combine_rows`.

    addresses: [n, k] int64, changed in place where ids is not -1; tokens: [m] int32, below n; ids: [m, k] int32;
    contiguous. base: the address of the first row; the others follow in order of (token, place), row_bytes each.
    Returns the number of rows. Raises ValueError, with nothing written, when a token is out of range.
    """
    functions = current()
    if functions is None:
        return reference_routing.place_rows(addresses, tokens, ids, base, row_bytes)
    num_tokens, top_k = addresses.shape
    assert addresses.dtype == _INT64
    assert tokens.dtype == _INT32
    assert ids.dtype == _INT32
    assert ids.shape == (len(tokens), top_k)
    num_pairs: int = functions.bk_place_rows(
        address_of(addresses), num_tokens, top_k, address_of(tokens), address_of(ids), len(tokens), base, row_bytes
    )
    if num_pairs < 0:
        raise ValueError(f"a token is not among {num_tokens}")
    return num_pairs


def _topk_ids(topk_ids: Tensor | np.ndarray) -> tuple[int, int, int]:
    """Address, num_tokens, top_k."""
    num_tokens, top_k = topk_ids.shape
    if isinstance(topk_ids, Tensor):
        assert topk_ids.dtype is torch.int32
        assert topk_ids.is_contiguous()
        return topk_ids.data_ptr(), num_tokens, top_k
    assert topk_ids.dtype == _INT32
    return address_of(topk_ids), num_tokens, top_k
