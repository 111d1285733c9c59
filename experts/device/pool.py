"""The expert pool of a model on a device: it counts there, and knows when a step begins and whether it counts."""

from __future__ import annotations

import torch

from experts.pool import ExpertPool, Transport


class DevicePool(ExpertPool):
    """Counts each layer's tokens as part of the step, so that a replayed CUDA graph counts them too."""

    def __init__(self, transport: Transport, num_layers: int, num_experts: int, device: torch.device) -> None:
        super().__init__(transport, num_layers, num_experts)
        self._expert_tokens = self._expert_tokens.to(device)

    @property
    def capturable(self) -> bool:
        """Whether a layer may be part of a CUDA graph of the trunk's."""
        return bool(getattr(self._transport, "capturable", False))

    def prepare(self) -> int:
        """Before a step is made up: a number that changes with the addresses by which rows travel, and so with all that
        was captured before."""
        return 0

    def begin_step(self, num_tokens: int) -> None:
        """Before the first layer of a step, whose layers have at most num_tokens tokens."""

    def settle(self) -> bool:
        """After a step, once it has been waited for: whether it counts, or must be computed again."""
        return True

    def _note(self, layer: int, topk_ids: torch.Tensor) -> None:
        ids = topk_ids.flatten().long()
        self._expert_tokens[layer].scatter_add_(0, ids.clamp(min=0), (ids >= 0).long())
