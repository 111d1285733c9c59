"""Around the local transport where experts are larger than memory: those that a layer chose are read before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from experts.expert_weights import ExpertReader
from experts.pool import DispatchBatch, Transport
from experts.residency import Residency
from experts.spec import FFNSpec


class ResidentTransport:
    """An experts.pool.Transport. reader: what mapped the experts that `transport` computes; layers: their specs."""

    def __init__(
        self, transport: Transport, residency: Residency, reader: ExpertReader, layers: Mapping[int, FFNSpec]
    ) -> None:
        self._transport = transport
        self._residency = residency
        self._reader = reader
        self._layers = layers

    def dispatch(self, batch: DispatchBatch) -> Any:
        """All that is missing is asked of the disk at once, before the first of it is waited for."""
        wanted = np.unique(batch.topk_ids.numpy())
        change = self._residency.touch(batch.layer, wanted[wanted >= 0].tolist())
        for layer, expert in change.to_drop:
            self._reader.release(self._layers[layer], layer, expert)
        for layer, expert in change.to_read:
            self._reader.prefetch(self._layers[layer], layer, expert)
        return self._transport.dispatch(batch)

    def combine(self, ticket: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As Transport.combine."""
        return self._transport.combine(ticket)
