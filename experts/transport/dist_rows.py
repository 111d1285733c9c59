"""One layer's tensors as they travel between ranks: whether they fit, who gets which, how they are packed and added up.

All of it works wherever the tensors lie. Where they lie in memory, `combine_on_cpu` is the fast way to combine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from barista.errors import BaristaError
from experts import kernels
from experts.pool import DispatchBatch
from experts.transport.dist_agreement import Agreement


def check_batch(batch: DispatchBatch, agreement: Agreement) -> None:
    """Raises BaristaError unless the batch is of the agreed shape and asks for experts that there are."""
    owners = agreement.owners.get(batch.layer)
    if owners is None:
        raise BaristaError(f"Layer {batch.layer} has no experts.", f"Those with experts: {sorted(agreement.owners)}.")
    hidden_states, topk_ids = batch.hidden_states, batch.topk_ids
    dtype = str(hidden_states.dtype).removeprefix("torch.")
    if (dtype, hidden_states.shape[1]) != (agreement.dtype, agreement.hidden_size):
        raise BaristaError(
            f"Rows of {hidden_states.shape[1]} {dtype} values do not fit a group that agreed on "
            f"{agreement.hidden_size} of {agreement.dtype}.",
            "Form a group for this model.",
        )
    if topk_ids.shape != batch.topk_weights.shape or len(topk_ids) != len(hidden_states):
        shapes = [tuple(tensor.shape) for tensor in (hidden_states, topk_ids, batch.topk_weights)]
        raise BaristaError(f"Rows, ids and weights of shapes {shapes} do not belong together.", "One row a token.")
    unknown = topk_ids[(topk_ids < -1) | (topk_ids >= len(owners))]
    if len(unknown):
        raise BaristaError(
            f"Expert {int(unknown[0])} of layer {batch.layer} was asked for.",
            f"It has experts 0 to {len(owners) - 1}; -1 asks for none.",
        )


@dataclass(frozen=True, slots=True)
class Split:
    """A layer's rows by rank: m go out, one for each rank and token that needs an expert of that rank, rank by rank.

    tokens: [m] int64, the token of each. topk_ids: [m, k] int32, -1 for the experts of other ranks. num_rows,
    num_pairs: of each rank. places: [n, k] int64, where each pair's expert row is among those that come back, which
    are in order of (rank, token, place in the top-k); -1 for pairs without an expert.
    """

    tokens: Tensor
    topk_ids: Tensor
    num_rows: list[int]
    num_pairs: list[int]
    places: Tensor


def split_rows(topk_ids: Tensor, owner: Tensor, num_ranks: int) -> Split:
    """topk_ids: [n, k] int32, -1 for none; owner: [num_experts] int64, the rank of each expert; on one device."""
    ranks = torch.arange(num_ranks, device=topk_ids.device).view(-1, 1, 1)
    theirs = (owner[topk_ids] == ranks) & (topk_ids >= 0)  # [ranks, n, k]
    needed = theirs.any(2)
    rank, tokens = needed.nonzero(as_tuple=True)
    _, token, place = theirs.nonzero(as_tuple=True)
    places = torch.full(topk_ids.shape, -1, device=topk_ids.device)
    places[token, place] = torch.arange(len(token), device=topk_ids.device)
    return Split(
        tokens,
        topk_ids[tokens].masked_fill(~theirs[rank, tokens], -1),
        needed.sum(1).tolist(),
        theirs.sum((1, 2)).tolist(),
        places,
    )


def places_of(chosen: Tensor) -> Tensor:
    """[n, k] int64: the number of each True of [n, k] bool, in order; -1 elsewhere."""
    return torch.where(chosen, chosen.flatten().cumsum(0).view_as(chosen) - 1, -1)


def pack(*columns: Tensor) -> Tensor:
    """[m, bytes] uint8: the rows of tensors [m, width] side by side, one message for all."""
    return torch.cat([column.contiguous().view(torch.uint8) for column in columns], dim=1)


def unpack(message: Tensor, *columns: tuple[torch.dtype, int]) -> list[Tensor]:
    """What `pack` was given, each in memory of its own. columns: dtype and width of each."""
    parts = torch.split(message, [dtype.itemsize * width for dtype, width in columns], dim=1)
    # Cloned, since a single row counts as contiguous whatever its stride.
    whole = [part.clone(memory_format=torch.contiguous_format) for part in parts]
    return [part.view(dtype) for part, (dtype, _) in zip(whole, columns, strict=True)]


def weighted_sum(rows: Tensor, places: Tensor, topk_weights: Tensor) -> Tensor:
    """[n, hidden] float32: each token's rows, weighted and added in top-k order.

    rows: [num_pairs + 1, hidden], the last one zeros: the place -1 of pairs without an expert. places: [n, k] int64;
    topk_weights: [n, k] float32.
    """
    weights = topk_weights.masked_fill(places < 0, 0)
    total = torch.zeros((len(places), rows.shape[1]), device=rows.device)
    for place, weight in zip(places.T, weights.T, strict=True):
        total += rows[place].float() * weight[:, None]
    return total


def rounded(total: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows [n, hidden] and failed [n] bool: a row in which anything is not finite is zeros."""
    rows = total.to(dtype)
    failed = ~rows.isfinite().all(-1)
    return rows.masked_fill_(failed[:, None], 0), failed


def combine_anywhere(rows: Tensor, places: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded weighted sum, on any device. Arguments as in weighted_sum."""
    return rounded(weighted_sum(rows, places, topk_weights), rows.dtype)


def combine_on_cpu(rows: Tensor, places: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes of combine_anywhere, by one call of the kernels."""
    at, size = places.numpy(), rows.shape[1] * rows.itemsize
    addresses = np.where(at < 0, 0, rows.data_ptr() + at * size)
    return kernels.combine_rows(addresses, topk_weights.contiguous(), rows.shape[1], rows.dtype)
