"""Which worker holds which expert: an immutable value, numbered by an epoch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

ExpertKey = tuple[int, int]
"""(layer, expert)."""


@dataclass(frozen=True)
class WorkerCapacity:
    """A worker that may hold experts.

    capacity_bytes: memory for experts. node: the machine that it fails with; domain: the wider failure domain (a rack,
    a zone), another one of which is preferred for a redundant replica. Workers whose node is empty count as being on
    one node, and so for domains.
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
