"""The transport without a wire: the experts live in the engine's own process."""

from __future__ import annotations

import torch

from experts import kernels
from experts.pool import DispatchBatch


class LocalTransport:
    """tables: one kernels.ExpertTable for each MoE layer, by layer index."""

    def __init__(self, tables: dict[int, kernels.ExpertTable]) -> None:
        self.tables = tables

    def dispatch(self, batch: DispatchBatch) -> DispatchBatch:
        """Nothing travels: the ticket is the batch, computed in combine."""
        return batch

    def combine(self, ticket: DispatchBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the layer."""
        table = self.tables[ticket.layer]
        return kernels.moe(ticket.hidden_states, ticket.topk_ids, ticket.topk_weights, table)
