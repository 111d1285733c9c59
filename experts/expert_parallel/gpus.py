"""The GPUs of an engine's group: chosen by how they are connected, and watched for as long as the group lives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from barista.errors import ConfigError
from experts.health.nvml import open_nvml
from experts.health.nvml_topology import read_topology
from experts.health.topology import Topology, plan_gpus
from experts.health.verdict import Condition, judge
from experts.health.watch import GpuWatch, watch_gpus

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GroupGpus:
    """CUDA indices of this process. workers: of each worker; they share GPUs where there are not enough."""

    engine: int
    workers: tuple[int, ...]


def visible_uuids() -> tuple[str, ...]:
    """NVML's names of the GPUs that CUDA shows this process, in CUDA's order."""
    return tuple(f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count()))


def choose_gpus(uuids: Sequence[str], num_workers: int, nvml: Any = None) -> GroupGpus:
    """One GPU each, peers by NVLink first; nvml: as of open_nvml.

    Where there are not more GPUs than workers, or nothing is known of their connections, by order. Raises ConfigError
    where too few of them are sound.
    """
    if len(uuids) <= num_workers:
        return GroupGpus(0, tuple(worker % len(uuids) for worker in range(num_workers)))
    known = _known(uuids, nvml)
    if known is None:
        return GroupGpus(0, tuple(range(1, 1 + num_workers)))
    topology, cuda_index, broken = known
    plan = plan_gpus(topology, 1, num_workers, exclude=broken)
    return GroupGpus(cuda_index[plan.trunk[0]], tuple(cuda_index[gpu] for gpu in plan.workers))


def _known(uuids: Sequence[str], nvml: Any) -> tuple[Topology, Mapping[int, int], frozenset[int]] | None:
    """How the GPUs are connected, CUDA's index of each, and those that must not be used, all by NVML's indices; None
    unless all of them answer."""
    try:
        opened = open_nvml(uuids, nvml)
    except ConfigError as error:
        log.warning("GPUs are taken in order: %s", error)
        return None
    if opened is None:
        return None
    try:
        topology = read_topology(opened)
        indices = {gpu.index: cuda for cuda, gpu in enumerate(opened.gpus)}
        looks = zip(opened.gpus, opened.read(), strict=True)
        broken = frozenset(gpu.index for gpu, look in looks if judge(None, look).condition is Condition.FATAL)
    finally:
        opened.close()
    return (topology, indices, broken) if set(topology.gpus) == indices.keys() else None


class Fitness:
    """A watch over each GPU of a group's workers. uuids: of each CUDA index; nvml: as of open_nvml, a new one for each.

    Without nvidia-ml-py or a driver that lets it ask, every GPU counts as fit, which the log tells.
    """

    def __init__(self, gpus: Sequence[int], uuids: Sequence[str], nvml: Callable[[], Any] = lambda: None) -> None:
        self._watches: dict[int, GpuWatch] = {}
        for gpu in sorted(set(gpus)):
            try:
                watch = watch_gpus([uuids[gpu]], nvml())
            except ConfigError as error:
                log.warning("GPU %d is not watched: %s", gpu, error)
                continue
            if watch is not None:
                self._watches[gpu] = watch

    def unfit(self) -> frozenset[int]:
        """CUDA indices of the GPUs that must not be used any more. Never waits."""
        return frozenset(
            gpu for gpu, watch in self._watches.items() if watch.report.verdict.condition is Condition.FATAL
        )

    def close(self) -> None:
        """End the watches."""
        for watch in self._watches.values():
            watch.close()
