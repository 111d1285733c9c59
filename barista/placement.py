"""Which worker holds which expert: an immutable value, numbered by an epoch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

ExpertKey = tuple[int, int]
"""(layer, expert)."""


@dataclass(frozen=True)
class WorkerCapacity:
    """A worker that may hold experts.

    capacity_bytes: memory for experts. node: the machine that it fails with; domain: the wider failure domain (a rack,
    a zone). Workers whose node is empty count as being on one node.
    """

    name: str
    capacity_bytes: int
    node: str = ""
    domain: str = ""


@dataclass(frozen=True)
class Placement:
    """The replicas of every expert of a model, as of an epoch.

    replicas: for every expert of the model the names of its workers, () where it is uncovered. digests: of each expert
    that has been loaded at least once; a digest stays when the last replica goes, so that no other weights can come
    back under the expert's name. Raises ValueError for a digest of an unknown expert or a worker named twice.
    """

    epoch: int
    replicas: Mapping[ExpertKey, tuple[str, ...]]
    digests: Mapping[ExpertKey, bytes]

    def __post_init__(self) -> None:
        if unknown := self.digests.keys() - self.replicas.keys():
            raise ValueError(f"digests of experts that the model does not have: {sorted(unknown)[:3]}")
        for key, workers in self.replicas.items():
            if len(set(workers)) != len(workers):
                raise ValueError(f"expert {key} names a worker twice: {workers}")
        object.__setattr__(self, "replicas", MappingProxyType(dict(self.replicas)))
        object.__setattr__(self, "digests", MappingProxyType(dict(self.digests)))

    @classmethod
    def empty(cls, layers: Mapping[int, int]) -> Placement:
        """Epoch 0, nothing held. layers: number of experts by layer."""
        keys = ((layer, expert) for layer in sorted(layers) for expert in range(layers[layer]))
        return cls(0, dict.fromkeys(keys, ()), {})

    @cached_property
    def _held(self) -> Mapping[str, frozenset[ExpertKey]]:
        held: dict[str, set[ExpertKey]] = {}
        for key, workers in self.replicas.items():
            for worker in workers:
                held.setdefault(worker, set()).add(key)
        return {worker: frozenset(keys) for worker, keys in held.items()}

    def held_by(self, worker: str) -> frozenset[ExpertKey]:
        """The experts of one worker; none for a worker that is not known."""
        return self._held.get(worker, frozenset())

    def uncovered(self, live: Collection[str] | None = None) -> tuple[ExpertKey, ...]:
        """The experts that no worker holds (with `live`: none of those), in order."""
        alive = None if live is None else frozenset(live)
        return tuple(
            sorted(
                key
                for key, workers in self.replicas.items()
                if not workers or (alive is not None and alive.isdisjoint(workers))
            )
        )

    def coverage(self, live: Collection[str] | None = None) -> float:
        """The share of the experts that some worker holds (with `live`: one of those), 0..1."""
        return 1 - len(self.uncovered(live)) / len(self.replicas) if self.replicas else 1.0

    def with_replicas(self, worker: str, digests: Mapping[ExpertKey, bytes]) -> Placement:
        """The next epoch, in which `worker` also holds the experts named by `digests`.

        Raises ValueError when an expert is not the model's or its digest is not the one that the pool knows.
        """
        replicas, known = dict(self.replicas), dict(self.digests)
        for key, digest in digests.items():
            if key not in replicas:
                raise ValueError(f"worker {worker} holds expert {key}, which the model does not have")
            if known.setdefault(key, digest) != digest:
                raise ValueError(
                    f"worker {worker} holds other weights as expert {key}: "
                    f"digest {digest.hex()}, the pool's is {known[key].hex()}"
                )
            if worker not in replicas[key]:
                replicas[key] = (*replicas[key], worker)
        return Placement(self.epoch + 1, replicas, known)

    def without_replicas(self, worker: str, keys: Iterable[ExpertKey]) -> Placement:
        """The next epoch, in which `worker` does not hold the experts `keys`."""
        replicas = dict(self.replicas)
        for key in self.held_by(worker).intersection(keys):
            replicas[key] = tuple(name for name in replicas[key] if name != worker)
        return Placement(self.epoch + 1, replicas, self.digests)

    def without(self, worker: str) -> Placement:
        """The next epoch, in which `worker` holds nothing."""
        return self.without_replicas(worker, self.held_by(worker))
