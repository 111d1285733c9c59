"""The pool as its controller knows it, from what workers and engines report. No sockets, no clock of its own.

experts.controller.picture is what results; experts.controller.reconcile closes the gap between it and the target.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from barista.placement import ExpertKey
from experts.controller.admission import refusal, wrong_digest
from experts.controller.member import Description, Member, Reach, worker_name
from experts.controller.picture import Engine, Picture, PoolSettings

__all__ = ["Pool", "PoolSettings"]

MISSES_UNTIL_LOST = 2  # calls that failed because nobody listens
TIMEOUTS_UNTIL_LOST = 5  # calls that were not answered in time: it may only be slow
RETRY_SECONDS = 1.0  # after an Assign that failed
LOAD_HALF_LIFE = 300.0


class Pool(Picture):
    """Events are methods, and change the picture."""

    def __init__(self, settings: PoolSettings, now: float = 0.0, *, found: Iterable[str] = ()) -> None:
        super().__init__(settings, now, found=found)
        self._halved = now

    # ------------------------------------------------------------------ members

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
        if member is not None and (member.address, member.node, member.domain) != (address, node, domain):
            if member.node not in ("", node):  # the drain was of the node that it has left
                member.draining = member.leaving or member.moving
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
        if not self.term_is_ours:
            self.stand_above(description.term, description.epoch, now)
        member.misses = 0
        member.pid, member.incarnation = description.pid, description.incarnation
        member.numerics_id, member.protocol_version = description.numerics_id, description.protocol_version
        member.capacity_bytes = description.capacity_bytes
        self._take_health(member, description)
        reason = refusal(self, member, description)
        if reason:
            self._refuse(member, reason, now)
            return
        returned = not member.live
        if returned:
            member.reach, member.since, member.detail, member.given_up = Reach.LIVE, now, "", False
            member.replaced = member.replaced if member.failing else 0
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
        elif member.reach in (Reach.STARTING, Reach.LOST) and member.detail != detail:
            member.detail = detail
            self._changed()

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

    # ------------------------------------------------------------------ replicas

    def loaded(self, name: str, incarnation: str, digests: dict[ExpertKey, bytes], now: float) -> None:
        """A member has loaded experts; they are named once they are proven."""
        member = self._present(name, incarnation)
        if member is None:
            return
        wrong = wrong_digest(self, digests)
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
        self.prove(member, key, now)

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

    def release_failed(self, name: str, incarnation: str, keys: Iterable[ExpertKey], now: float) -> None:
        """A Release could not be made: it is tried again, if it is still wanted. Others may be under way."""
        member = self._present(name, incarnation)
        if member is not None:
            member.releasing.difference_update(keys)
            self.publish(now)

    # ------------------------------------------------------------------ engines

    def engine_said(self, engine: str, term: int, epoch: int, tokens: Mapping[ExpertKey, int], now: float) -> None:
        """An engine is attached, uses the placement (term, epoch), and has routed tokens since it last spoke.

        Only a placement of this controller is acknowledged by that: an older one's epochs say nothing of this one's.
        """
        if engine not in self.engines:
            self.engines[engine] = Engine()
            self._changed()
        self.engines[engine].spoke = now
        if self.term_is_ours and term == self.term and epoch <= self.epoch:
            self.engines[engine].acknowledged = max(self.engines[engine].acknowledged, epoch)
        else:
            self.stand_above(term, epoch, now)
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

    # ------------------------------------------------------------------ inside

    def _present(self, name: str, incarnation: str) -> Member | None:
        member = self.members.get(name)
        return member if member is not None and member.live and member.incarnation == incarnation else None

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

    def _take_health(self, member: Member, description: Description) -> None:
        """Another process that is well ends what its predecessor was retired for."""
        if member.gpus != description.gpus:
            member.gpus = description.gpus
            self.readings += 1
        if member.verdict != description.verdict:
            member.verdict = description.verdict
            self._changed()
        if member.retired and not (member.failing or member.moving):
            member.retired, member.replaced, member.draining = False, 0, member.leaving
            self._changed()

    def _live_target(self, key: ExpertKey) -> list[str]:
        return [name for name in self.target[key] if name in self.members and self.members[name].live]

    def _refuse(self, member: Member, detail: str, now: float) -> None:
        if (member.reach, member.detail) != (Reach.REFUSED, detail):
            member.reach, member.since, member.detail = Reach.REFUSED, now, detail
            member.forget()
            self._changed()
            self.publish(now)
