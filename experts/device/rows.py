"""Rows on their way to the experts of a device and back. Shapes never depend on values, so nothing waits for the host.

A pair is one token's choice of one expert; the pairs of token t in top-k order are t * k to t * k + k - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sort_by_expert(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The order in which the pairs lie side by side by expert, and where each expert's end.

    topk_ids: [num_tokens, k] int32, -1 for none, which come last. Returns order [num_tokens * k] int64, the pairs'
    indices, and ends [num_experts] int32, as DeviceExperts takes them. The order of equals is that of the pairs.
    """
    ids = topk_ids.flatten()
    by_expert, order = ids.masked_fill(ids < 0, num_experts).sort(stable=True)
    experts = torch.arange(num_experts, dtype=ids.dtype, device=ids.device)
    return order, torch.searchsorted(by_expert, experts, right=True, out_int32=True)


def combine(pair_rows: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of each token, weighted and added in float32 in top-k order and rounded once.

    pair_rows: [num_tokens * k, hidden], undefined where topk_ids [num_tokens, k] is -1; topk_weights: [num_tokens, k]
    float32. Returns rows [num_tokens, hidden] in the dtype of pair_rows and failed [num_tokens] bool: a row in which
    anything is not finite is zeros.
    """
    num_tokens, top_k = topk_ids.shape
    none = topk_ids[:, :, None] < 0
    chosen = pair_rows.view(num_tokens, top_k, -1).masked_fill(none, 0)
    total = torch.zeros(chosen[:, 0].shape, device=pair_rows.device)
    for place in range(top_k):
        total.addcmul_(chosen[:, place].float(), topk_weights[:, place, None])
    return zero_if_not_finite(total.to(pair_rows.dtype))


def zero_if_not_finite(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows [n, width], zeros where one holds anything that is not finite, and which [n] bool these are."""
    failed = ~rows.isfinite().all(-1)
    return rows.masked_fill(failed[:, None], 0), failed
