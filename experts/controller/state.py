"""The pool as its controller knows it, from what workers and engines report. No sockets, no clock of its own.

Two pictures are kept apart. `target` says who shall hold each expert; planning and commands write it. What workers
really hold is in the members. The published placement follows from both (`named`), so that it never names a replica
that is not there and never uncovers an expert that a live worker holds. experts.controller.reconcile closes the gap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from barista.placement import ExpertKey, Placement
from experts.controller.member import Description, Member, Reach, Withdrawal, worker_name

MISSES_UNTIL_LOST = 2  # calls that failed because nobody listens
TIMEOUTS_UNTIL_LOST = 5  # calls that were not answered in time: it may only be slow
RETRY_SECONDS = 1.0  # after an Assign that failed
LOAD_HALF_LIFE = 300.0
PROOFS_SECONDS = 0.1  # a proven replica waits so long for others, to share an epoch with them


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """name: None for the pool of one server. layers: number of experts, expert_bytes: size of one expert, by layer."""

    name: str | None
    model_digest: bytes
    layers: Mapping[int, int]
    expert_bytes: Mapping[int, int]
    redundancy: int = 2


class Pool:
    """Members, target and placement. Events are methods; `revision` grows with everything that a watcher can see.

    found: workers that an earlier controller made.
    """

    def __init__(self, settings: PoolSettings, now: float = 0.0, *, found: Iterable[str] = ()) -> None:
        self.settings = settings
        self.members: dict[str, Member] = {}
        self.placement = Placement.empty(settings.layers)
        self.target: dict[ExpertKey, frozenset[str]] = {key: frozenset() for key in self.placement.replicas}
        self.engines: dict[str, int] = {}
        self.load: dict[ExpertKey, float] = dict.fromkeys(self.target, 0.0)
        self.planned_for: frozenset[str] = frozenset()
        self.missing_bytes = 0
        self.settled = False
        self.term = 0
        self.term_is_ours = False
        self.moves = 0
        self.revision = 0
        self._unpublished_since: float | None = None
        self._halved = now
        self.members.update((name, Member(name, now)) for name in found)
        self._was_found = bool(self.members)

    # ------------------------------------------------------------------ what it is

    @property
    def epoch(self) -> int:
        """Of the published placement."""
        return self.placement.epoch

    @property
    def recovering(self) -> bool:
        """The workers are older than this controller and not all of them were heard: no placement to act on."""
        return self._was_found and not self.term_is_ours

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

    # ------------------------------------------------------------------ events: members

    def add(self, count: int, now: float) -> list[str]:
        """New members that are starting, with the lowest free numbers. Returns their names."""
        names: list[str] = []
        number = 0
        while len(names) < count:
            if worker_name(number) not in self.members:
                names.append(worker_name(number))
                self.members[names[-1]] = Member(names[-1], now)
            number += 1
        self._changed()
        return names

    def remove(self, name: str, now: float) -> None:
        """A member that was stopped."""
        self.members.pop(name, None)
        self._changed()
        self.set_target({key: names - {name} for key, names in self.target.items()}, now)

    def located(self, name: str, address: str, node: str, domain: str = "") -> None:
        """Where a member can be reached."""
        member = self.members.get(name)
        if member is not None:
            member.address, member.node, member.domain = address, node, domain
            self._changed()

    def described(self, name: str, description: Description, now: float, *, asked_at: int | None = None) -> None:
        """A member answered. Another incarnation than the last one has lost what it held.

        asked_at: the member's `changes` when it was asked. If more has been loaded or released since, what the answer
        says of replicas is old.
        """
        member = self.members.get(name)
        if member is None:
            return
        reborn = member.incarnation != description.incarnation
        if reborn:
            member.restarts += bool(member.incarnation)
            member.fault = ""
            member.forget()
        self._learn_term(description)
        member.misses = 0
        member.pid, member.incarnation = description.pid, description.incarnation
        member.numerics_id, member.protocol_version = description.numerics_id, description.protocol_version
        member.capacity_bytes = description.capacity_bytes
        refusal = self._refusal(member, description)
        if refusal:
            self._refuse(member, refusal, now)
            return
        returned = not member.live
        if returned:
            member.reach, member.since, member.detail, member.given_up = Reach.LIVE, now, "", False
            member.draining = member.draining or description.draining
        news = asked_at in (None, member.changes) and self._take_held(member, description.held)
        if reborn or returned or news:
            self._changed()
            self.publish(now)

    def unreachable(self, name: str, detail: str, now: float, *, timeout: bool = False) -> None:
        """A call to a member failed: nobody listens there, or (timeout) no answer came."""
        member = self.members.get(name)
        if member is None:
            return
        member.misses += 1
        if member.live and member.misses >= (TIMEOUTS_UNTIL_LOST if timeout else MISSES_UNTIL_LOST):
            self.lost(name, detail, now)

    def lost(self, name: str, detail: str, now: float) -> None:
        """A member died or went out of reach. It may come back as it was, or empty as another incarnation."""
        member = self.members[name]
        member.reach, member.since, member.detail = Reach.LOST, now, detail
        member.loading.clear()
        member.proving.clear()
        member.releasing.clear()
        self._changed()
        self.publish(now)

    def cannot_serve(self, name: str, detail: str, now: float) -> None:
        """A member is there but cannot do its work, for want of its checkpoint perhaps."""
        member = self.members.get(name)
        if member is not None:
            self._refuse(member, detail, now)

    # ------------------------------------------------------------------ events: replicas

    def loaded(self, name: str, incarnation: str, digests: dict[ExpertKey, bytes], now: float) -> None:
        """A member has loaded experts; they are named once they are proven."""
        member = self._present(name, incarnation)
        if member is None:
            return
        wrong = self._wrong_digest(digests)
        if wrong:
            member.fault = wrong
            self._refuse(member, wrong, now)
            return
        member.loading.difference_update(digests)
        if self.settled:
            self.moves += len(digests.keys() - member.held.keys())
        member.changes += 1
        if self._take_held(member, member.held | digests):
            self._changed()
            self.publish(now)

    def assign_ended(self, name: str, incarnation: str, error: str, now: float) -> None:
        """An Assign is over; what it did not load is tried again after a while. error: empty if all went well."""
        member = self._present(name, incarnation)
        if member is None:
            return
        member.loading.clear()
        if member.detail != error:
            member.detail = error
            self._changed()
        if error:
            member.retry_at = now + RETRY_SECONDS

    def proved(self, name: str, incarnation: str, key: ExpertKey, fault: str, now: float) -> None:
        """A replica was compared with another one; `publish_proven` names it. fault: how they differ, or empty."""
        member = self._present(name, incarnation)
        if member is None or key not in member.held:
            return
        member.proving.discard(key)
        if fault:
            member.fault = fault
            self._refuse(member, fault, now)
            return
        member.proven.add(key)
        if self._unpublished_since is None:
            self._unpublished_since = now

    def probe_failed(self, name: str, incarnation: str, key: ExpertKey) -> None:
        """The comparison could not be made: it is tried again."""
        member = self._present(name, incarnation)
        if member is not None:
            member.proving.discard(key)

    def released(self, name: str, incarnation: str, keys: Iterable[ExpertKey]) -> None:
        """A member has forgotten experts."""
        member = self._present(name, incarnation)
        if member is None:
            return
        keys = [key for key in keys if key in member.held]
        member.dropped(keys)
        member.changes += 1
        self.moves += len(keys)
        self._changed()

    def release_failed(self, name: str, incarnation: str, now: float) -> None:
        """A Release could not be made: it is tried again, if it is still wanted."""
        member = self._present(name, incarnation)
        if member is not None:
            member.releasing.clear()
            self.publish(now)

    # ------------------------------------------------------------------ events: engines

    def engine_said(self, engine: str, epoch: int, tokens: Mapping[ExpertKey, int], now: float) -> None:
        """An engine is attached, uses `epoch`, and has routed tokens since it last spoke."""
        if engine not in self.engines:
            self._changed()
        self.engines[engine] = max(epoch, self.engines.get(engine, 0))
        if now - self._halved > LOAD_HALF_LIFE:
            self._halved = now
            self.load = {key: load / 2 for key, load in self.load.items()}
        for key, count in tokens.items():
            if key in self.load:
                self.load[key] += count

    def engine_gone(self, engine: str) -> None:
        """An engine's stream ended."""
        if self.engines.pop(engine, None) is not None:
            self._changed()

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
        if replicas == self.placement.replicas and digests == self.placement.digests:
            return
        self._changed()
        self.placement = Placement(self.epoch + 1, replicas, digests)
        for member in self.members.values():
            unnamed = {key for key in member.held if member.name not in replicas[key]}
            for key in [key for key in member.withdrawn if key not in unnamed]:
                del member.withdrawn[key]
            for key in unnamed - member.withdrawn.keys():
                member.withdrawn[key] = Withdrawal(self.epoch, now)

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

    # ------------------------------------------------------------------ inside

    def _changed(self) -> None:
        self.revision += 1

    def _present(self, name: str, incarnation: str) -> Member | None:
        member = self.members.get(name)
        return member if member is not None and member.live and member.incarnation == incarnation else None

    def _is_short(self, member: Member) -> bool:
        return self.free_bytes(member) < self.bytes_of(set(self.pending(member)) - member.loading)

    def _learn_term(self, description: Description) -> None:
        if not self.term_is_ours:
            self.term = max(self.term, description.term)
            if description.epoch > self.epoch:
                self.placement = Placement(description.epoch, self.placement.replicas, self.placement.digests)

    def _take_held(self, member: Member, held: Mapping[ExpertKey, bytes]) -> bool:
        """What a member holds, however it came to it; False if that is known. Proven at once: all that comes before the
        first placement is complete, and what nobody else holds."""
        new = [key for key in held.keys() - member.held.keys() if key in self.target]
        gone = member.held.keys() - held.keys()
        if not new and not gone:
            return False
        member.dropped(list(gone))
        for key in new:
            member.held[key] = held[key]
            if not member.draining and len(self._live_target(key)) < self.settings.redundancy:
                self.target[key] |= {member.name}
            if not self.settled or not self.holders(key):
                member.proven.add(key)
        return True

    def _live_target(self, key: ExpertKey) -> list[str]:
        return [name for name in self.target[key] if name in self.members and self.members[name].live]

    def _refusal(self, member: Member, description: Description) -> str:
        """Why the worker cannot be in this pool; empty if it can."""
        if member.fault:
            return member.fault
        if description.model_digest != self.settings.model_digest:
            return (
                f"It has another checkpoint (digest {description.model_digest.hex()}, the pool's is "
                f"{self.settings.model_digest.hex()}). Put the same model at the same path on its node."
            )
        first = next((other for other in self.live if other is not member), None)
        if first is not None and description.protocol_version != first.protocol_version:
            return (
                f"It speaks version {description.protocol_version} of the protocol and {first.name} speaks "
                f"{first.protocol_version}. Install the same Barista on every node."
            )
        if first is not None and description.numerics_id != first.numerics_id:
            return (
                f"Its rows would differ from those of {first.name}: {description.numerics_id} is not "
                f"{first.numerics_id}. Use nodes with the same instruction set and the same Barista."
            )
        return self._wrong_digest(description.held)

    def _wrong_digest(self, digests: Mapping[ExpertKey, bytes]) -> str:
        for (layer, expert), digest in digests.items():
            known = self.placement.digests.get((layer, expert), digest)
            if known != digest:
                return (
                    f"It holds other weights as expert {expert} of layer {layer} (digest {digest.hex()}, the pool's is "
                    f"{known.hex()}). Put the same model at the same path on its node."
                )
        return ""

    def _refuse(self, member: Member, detail: str, now: float) -> None:
        if (member.reach, member.detail) != (Reach.REFUSED, detail):
            member.reach, member.since, member.detail = Reach.REFUSED, now, detail
            member.forget()
            self._changed()
            self.publish(now)
