"""Which GPUs of a node are neighbours, and which of them an engine and its workers should have."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from barista.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Peer:
    """How two GPUs are connected. nvlinks: active ones, direct or by a switch; p2p: one can read the other's memory."""

    nvlinks: int = 0
    p2p: bool | None = None


@dataclass(frozen=True, slots=True)
class Topology:
    """gpus: NVML's indices. peers: by (lower, higher) index; a pair that is absent shares nothing."""

    gpus: tuple[int, ...]
    peers: Mapping[tuple[int, int], Peer]

    def between(self, first: int, second: int) -> Peer:
        """How these two are connected."""
        return self.peers.get((min(first, second), max(first, second)), Peer())


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """The engine's own GPUs, and those of its workers, the nearest first."""

    trunk: tuple[int, ...]
    workers: tuple[int, ...]


def plan_gpus(topology: Topology, num_trunk: int, num_workers: int, exclude: Collection[int] = ()) -> GpuPlan:
    """Choose the GPUs of an engine's trunk and of its workers: peers by NVLink first.

    Rows travel between the trunk and every worker, and between the GPUs of the trunk, never between workers. So what
    counts is how many of these pairs have an NVLink, then how many links, then how many pairs reach each other's
    memory; ties go to the lower indices. No choice is better: once the trunk is given, each worker counts alone.
    exclude: GPUs that are not to be used, such as those with a fatal verdict.
    Raises ConfigError for too few GPUs, ValueError for counts that make no engine.
    """
    if num_trunk < 1 or num_workers < 0:
        raise ValueError(f"an engine of {num_trunk} GPUs with {num_workers} workers")
    usable = sorted(set(topology.gpus) - set(exclude))
    if len(usable) < num_trunk + num_workers:
        raise ConfigError(
            f"{num_trunk} GPUs for the engine and {num_workers} for workers are wanted, and {len(usable)} of "
            f"{len(topology.gpus)} can be used.",
            "Ask for fewer workers, or for a node with more GPUs.",
        )
    plans = (_with_workers(topology, trunk, usable, num_workers) for trunk in combinations(usable, num_trunk))
    return max(plans, key=lambda plan: score(topology, plan))  # the first of equals


def score(topology: Topology, plan: GpuPlan) -> tuple[int, int, int]:
    """Of the pairs that rows travel between: those with NVLinks, their links, those that reach each other's memory."""
    pairs = [*combinations(plan.trunk, 2), *((gpu, worker) for gpu in plan.trunk for worker in plan.workers)]
    return _score(topology, pairs)


def _with_workers(topology: Topology, trunk: Sequence[int], usable: Sequence[int], num_workers: int) -> GpuPlan:
    def distance(worker: int) -> tuple[int, ...]:
        near = _score(topology, [(gpu, worker) for gpu in trunk])
        return (*(-value for value in near), worker)

    return GpuPlan(tuple(trunk), tuple(sorted(set(usable) - set(trunk), key=distance)[:num_workers]))


def _score(topology: Topology, pairs: Collection[tuple[int, int]]) -> tuple[int, int, int]:
    peers = [topology.between(*pair) for pair in pairs]
    return (
        sum(peer.nvlinks > 0 for peer in peers),
        sum(peer.nvlinks for peer in peers),
        sum(peer.p2p is True for peer in peers),
    )
