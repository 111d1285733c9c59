"""What a controller knows of its pool, and the placement that it publishes. No sockets, no clock of its own.

Two pictures are kept apart. `target` says who shall hold each expert; planning and commands write it. What workers
really hold is in the members. The published placement follows from both (`named`), so that it never names a replica
that is not there and never uncovers an expert that a live worker holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from barista.placement import ExpertKey, Placement
from experts.controller.member import Member

PROOFS_SECONDS = 0.1  # a proven replica waits so long for others, to share an epoch with them


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """name: None for the pool of one server. layers: number of experts, expert_bytes: size of one expert, by layer."""

    name: str | None
    model_digest: bytes
    layers: Mapping[int, int]
    expert_bytes: Mapping[int, int]
    redundancy: int = 2


@dataclass(slots=True)
class Engine:
    """acknowledged: the newest placement of this controller that it uses, 0 for none; spoke: when it was heard last."""

    acknowledged: int = 0
    spoke: float = 0.0


class Picture:
    """Members, target and placement. `revision` grows with everything that watchers are told, `readings` with what is
    told only to those who ask: the readings of GPUs, which change all the time.

    term, epoch: number the placements of all the pool's controllers in order. found: workers that an earlier one made.
    """

    def __init__(self, settings: PoolSettings, now: float = 0.0, *, found: Iterable[str] = ()) -> None:
        self.settings = settings
        self.members: dict[str, Member] = {}
        self.placement = Placement.empty(settings.layers)
        self.target: dict[ExpertKey, frozenset[str]] = {key: frozenset() for key in self.placement.replicas}
        self.engines: dict[str, Engine] = {}
        self.load: dict[ExpertKey, float] = dict.fromkeys(self.target, 0.0)
        self.planned_for: frozenset[str] = frozenset()
        self.missing_bytes = 0
        self.settled = False
        self.term = 0
        self.term_is_ours = False
        self.moves = 0
        self.revision = 0
        self.readings = 0
        self._unpublished_since: float | None = None
        self.began = now
        self.members.update((name, Member(name, now)) for name in found)
        self.succeeds = bool(self.members)

    # ------------------------------------------------------------------ what it is

    @property
    def epoch(self) -> int:
        """Of the published placement."""
        return self.placement.epoch

    @property
    def recovering(self) -> bool:
        """The workers are older than this controller and not all of them were heard: no placement to act on."""
        return self.succeeds and not self.term_is_ours

    @property
    def live(self) -> list[Member]:
        """Members that answer, by number."""
        return [member for member in self.sorted_members() if member.live]

    def sorted_members(self) -> list[Member]:
        """All members, by number."""
        return sorted(self.members.values(), key=lambda member: member.number)

    def bytes_of(self, experts: Iterable[ExpertKey]) -> int:
        """Memory that these experts take."""
        return sum(self.settings.expert_bytes[layer] for layer, _ in experts)

    def free_bytes(self, member: Member) -> int:
        """What the member can still take, beside what it holds and what is on its way."""
        return member.capacity_bytes - self.bytes_of(member.held.keys() | member.loading)

    def pending(self, member: Member) -> list[ExpertKey]:
        """Experts that the member shall hold and does not, in order."""
        return [key for key, names in self.target.items() if member.name in names and key not in member.held]

    def holders(self, key: ExpertKey) -> list[Member]:
        """Live members whose replica may be named, by number."""
        return [member for member in self.live if key in member.proven and key not in member.releasing]

    # ------------------------------------------------------------------ the placement

    def named(self, key: ExpertKey, live: Sequence[Member], short: frozenset[str]) -> tuple[str, ...]:
        """The replicas of an expert that engines shall use, by worker number.

        Every wanted replica that is proven. The unwanted ones too while there is no wanted one, or while a wanted one
        is missing and the memory of the unwanted one is not needed. short: members that need memory.
        """
        target = self.target[key]
        holders = [member.name for member in live if key in member.proven and key not in member.releasing]
        wanted = [name for name in holders if name in target]
        if len(wanted) == len(holders):
            return tuple(wanted)
        if not wanted:
            return tuple(holders)
        missing = len(wanted) < len(target)
        return tuple(name for name in holders if name in target or (missing and name not in short))

    def publish(self, now: float) -> None:
        """Make the placement follow what is held; a change is a new epoch."""
        self._unpublished_since = None
        live = self.live
        short = frozenset(member.name for member in live if self._is_short(member))
        replicas = {key: self.named(key, live, short) for key in self.target}
        digests = dict(self.placement.digests)
        for member in live:
            digests.update((key, member.held[key]) for key in member.proven)
        if replicas != self.placement.replicas or digests != self.placement.digests:
            self._changed()
            self.placement = Placement(self.epoch + 1, replicas, digests)
        for member in self.members.values():  # also where nothing changed: what came too late was never named
            unnamed = {key for key in member.held if member.name not in replicas[key]}
            for key in [key for key in member.withdrawn if key not in unnamed]:
                del member.withdrawn[key]
            for key in unnamed - member.withdrawn.keys():
                member.withdrawn[key] = self.epoch

    def prove(self, member: Member, key: ExpertKey, now: float) -> None:
        """A replica of it may be named; `publish_proven` does so."""
        member.proven.add(key)
        if self._unpublished_since is None:
            self._unpublished_since = now

    def publish_proven(self, now: float) -> None:
        """Name the replicas that were proven: one epoch for all that come within a tenth of a second."""
        since = self._unpublished_since
        proving = any(member.proving for member in self.members.values())
        if since is not None and (not proving or now - since >= PROOFS_SECONDS):
            self.publish(now)

    def set_target(self, target: Mapping[ExpertKey, Iterable[str]], now: float) -> None:
        """Who shall hold each expert from now on."""
        self.target = {key: frozenset(names) for key, names in target.items()}
        self.publish(now)

    def take_term(self) -> None:
        """Stand above every controller that the workers have heard of, before the first word to any of them."""
        if not self.term_is_ours:
            self.term += 1
            self.term_is_ours = True
            self._changed()

    def stand_above(self, term: int, epoch: int, now: float) -> None:
        """Somebody has heard of this placement, which is not of this controller: all that follows is newer."""
        if not self.term_is_ours:
            self.term = max(self.term, term)
        elif term >= self.term:
            self.term = term + 1
            for engine in self.engines.values():
                engine.acknowledged = 0
        if 0 < epoch >= self.epoch:
            self.placement = replace(self.placement, epoch=epoch + 1)
            self._changed()

    def _changed(self) -> None:
        self.revision += 1

    def _is_short(self, member: Member) -> bool:
        return self.free_bytes(member) < self.bytes_of(set(self.pending(member)) - member.loading)
