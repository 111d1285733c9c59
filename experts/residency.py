"""Which experts stay in memory where not all of them may: those used most recently. A pure policy that reads nothing.

Recency is counted in visits of an expert's own layer. Layers are visited in turn, over and over, so by the clock the
oldest expert is one that the next layer is about to ask for, and a plain LRU a little too small never hits at all. Of
equally recent experts the first to go are those whose layer comes again last.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

Expert = tuple[int, int]
"""(layer, expert)."""


@dataclass(frozen=True, slots=True)
class Change:
    """What must happen before a layer is computed: first the drops, then the reads, the latter in the order asked."""

    to_drop: tuple[Expert, ...]
    to_read: tuple[Expert, ...]


class Residency:
    """Who is held. limit: bytes of experts; expert_bytes: of one expert, by layer.

    queries: experts that layers have asked for; hits: those of them that were held. resident_bytes: held now.
    """

    def __init__(self, limit: int, expert_bytes: Mapping[int, int]) -> None:
        self.limit = limit
        self._bytes = dict(expert_bytes)
        self._position = {layer: position for position, layer in enumerate(sorted(expert_bytes))}
        self._visits = dict.fromkeys(expert_bytes, 0)
        # Layer -> expert -> the visit in which it was used last, oldest first.
        self._held: dict[int, dict[int, int]] = {layer: {} for layer in expert_bytes}
        self.queries = 0
        self.hits = 0
        self.resident_bytes = 0

    def touch(self, layer: int, wanted: Collection[int]) -> Change:
        """A layer asks for these experts, each named once; all of them are held from now on.

        Others are dropped until the limit is kept, or nothing but the wanted ones is left.
        """
        held = self._held[layer]
        missing = tuple((layer, expert) for expert in wanted if expert not in held)
        self.queries += len(wanted)
        self.hits += len(wanted) - len(missing)
        self._visits[layer] += 1
        for expert in wanted:
            held.pop(expert, None)
            held[expert] = self._visits[layer]
        self.resident_bytes += len(missing) * self._bytes[layer]
        return Change(self._drop_for(layer), missing)

    @property
    def held(self) -> frozenset[Expert]:
        """Everything that is held now."""
        return frozenset((layer, expert) for layer, held in self._held.items() for expert in held)

    def _drop_for(self, layer: int) -> tuple[Expert, ...]:
        """Make room for what the layer has just asked for."""
        dropped = []
        while self.resident_bytes > self.limit and (victim := self._victim(layer)) is not None:
            self._held[victim[0]].pop(victim[1])
            self.resident_bytes -= self._bytes[victim[0]]
            dropped.append(victim)
        return tuple(dropped)

    def _victim(self, current: int) -> Expert | None:
        """The expert to be missed least; None if only those that the current layer has just asked for are left."""
        victim, worst = None, (-1, -1)
        for layer, held in self._held.items():
            if not held:
                continue
            expert, used = next(iter(held.items()))
            age = self._visits[layer] - used
            if layer == current and age == 0:
                continue
            layers_until_next = (self._position[layer] - self._position[current] - 1) % len(self._position)
            if (age, layers_until_next) > worst:
                victim, worst = (layer, expert), (age, layers_until_next)
        return victim
