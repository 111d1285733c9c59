"""The transport without a wire on a device: the experts lie beside the trunk, and the host is never waited for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.device.experts import DeviceExperts
from experts.device.rows import combine, sort_by_expert
from experts.pool import DispatchBatch


@dataclass(frozen=True, slots=True)
class Ticket:
    """A layer that the device has been asked for. pair_rows: [num_tokens * k, hidden], each pair's expert row."""

    pair_rows: Tensor
    batch: DispatchBatch


class DeviceTransport:
    """experts: all of each MoE layer, by layer index, on one device."""

    def __init__(self, experts: Mapping[int, DeviceExperts]) -> None:
        self._experts = experts

    @property
    def capturable(self) -> bool:
        """Whether a layer may be part of a CUDA graph."""
        return all(experts.capturable for experts in self._experts.values())

    def dispatch(self, batch: DispatchBatch) -> Ticket:
        """Ask the device for the layer. topk_ids may hold -1 for none."""
        experts = self._experts[batch.layer]
        order, ends = sort_by_expert(batch.topk_ids, experts.num_experts)
        rows = experts(batch.hidden_states[order // batch.topk_ids.shape[1]], ends)
        return Ticket(torch.empty_like(rows).index_copy_(0, order, rows), batch)

    def combine(self, ticket: Ticket) -> tuple[Tensor, Tensor]:
        """See Transport."""
        return combine(ticket.pair_rows, ticket.batch.topk_ids, ticket.batch.topk_weights)
