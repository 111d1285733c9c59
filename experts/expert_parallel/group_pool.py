"""The expert pool of a model whose experts are on other ranks: as on one device, with steps that may not count."""

from __future__ import annotations

import torch

from experts.device.pool import DevicePool
from experts.expert_parallel.pool import ParallelPool


class GroupPool(DevicePool):
    """Tokens of a step that does not count are not counted. device: the engine's."""

    def __init__(self, group: ParallelPool, num_layers: int, num_experts: int, device: torch.device) -> None:
        super().__init__(group, num_layers, num_experts, device)
        self._group = group
        self._counted_before = self._expert_tokens.clone()
        self.recomputed_steps = 0

    def prepare(self) -> int:
        """See DevicePool: the group's generation. Raises as ParallelPool.prepare."""
        self._group.prepare()
        return self._group.generation

    def begin_step(self, num_tokens: int) -> None:
        """See DevicePool: the workers are told."""
        self._counted_before.copy_(self._expert_tokens)
        self._group.begin_step(num_tokens)

    def settle(self) -> bool:
        """See DevicePool. Raises as ParallelPool.settle."""
        if self._group.settle():
            return True
        self._expert_tokens.copy_(self._counted_before)
        self.recomputed_steps += 1
        return False

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Of the workers that live."""
        return self._group.worker_pids

    @property
    def workers_lost(self) -> int:
        """How many have died, hung, or were on a GPU that failed."""
        return self._group.workers_lost

    def close(self) -> None:
        """End the workers."""
        self._group.close()
