"""What to tell the workers next, so that what they hold becomes what they shall hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from barista.placement import ExpertKey
from experts.controller.member import Member, Reach
from experts.controller.state import Pool

SILENT_SECONDS = 10.0  # engines speak each second: one that is silent for longer is not waited for
RETURN_SECONDS = 5.0  # after a new controller's start
HUNG_SECONDS = 60.0  # a worker that is lost for so long is not coming back as it is


@dataclass(frozen=True, slots=True)
class Assign:
    """Load these experts."""

    worker: str
    incarnation: str
    experts: tuple[ExpertKey, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """Compare one row of the new replica on `worker` with that on `reference`."""

    worker: str
    incarnation: str
    reference: str
    expert: ExpertKey


@dataclass(frozen=True, slots=True)
class Release:
    """Forget these experts: nobody uses them here any more."""

    worker: str
    incarnation: str
    experts: tuple[ExpertKey, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """End this worker for good: it holds nothing that is needed."""

    worker: str


@dataclass(frozen=True, slots=True)
class Restart:
    """Replace this worker's process, if there is one: it may run and yet not answer."""

    worker: str


@dataclass(frozen=True, slots=True)
class Move:
    """Replace this worker's process by one on other hardware, if there is some: it was retired and holds nothing."""

    worker: str


Action = Assign | Probe | Release | Stop | Restart | Move


def next_actions(pool: Pool, now: float) -> list[Action]:
    """What can be done now and is not under way. Each is marked as under way until its event comes."""
    if not pool.planned_for:
        return []
    pool.take_term()
    actions: list[Action] = [*_assigns(pool, now), *_probes(pool, now), *_releases(pool, now), *_stops(pool)]
    actions += [*_restarts(pool, now), *_moves(pool, now)]
    pool.settled = pool.settled or (not pool.placement.uncovered() and is_settled(pool))
    return actions


def ended(pool: Pool, action: Action, error: str, now: float) -> None:
    """An action is over, well or not (error); it is not under way any more."""
    match action:
        case Assign():
            pool.assign_ended(action.worker, action.incarnation, error, now)
        case Probe() if error:
            pool.probe_failed(action.worker, action.incarnation, action.expert)
        case Release() if error:
            pool.release_failed(action.worker, action.incarnation, action.experts, now)
        case Move() if action.worker in pool.members:
            pool.members[action.worker].moving = False
        case Stop() if error and action.worker in pool.members:
            pool.members[action.worker].stopping = False


def is_settled(pool: Pool) -> bool:
    """Every live worker holds what it shall hold and nothing else, and all of that is proven."""
    return all(
        not member.loading
        and member.proven >= member.held.keys()
        and all(member.name in pool.target[key] for key in member.held)
        and not pool.pending(member)
        for member in pool.live
    )


def _assigns(pool: Pool, now: float) -> Iterator[Assign]:
    """One batch for each idle worker: what nobody holds; once none of that can be loaded, the other replicas."""
    idle = [member for member in pool.live if not member.loading and now >= member.retry_at]
    room = {member.name: pool.free_bytes(member) for member in idle}
    uncovered = set(pool.placement.uncovered())
    loading = {key for member in pool.live for key in member.loading}
    batches = _shared_out(pool, uncovered - loading, room)
    if not uncovered & loading and not any(batches.values()):
        for member in idle:
            for key in pool.pending(member):
                _take(pool, member.name, key, batches, room)
    for member in idle:
        if batches[member.name]:
            member.loading.update(batches[member.name])
            yield Assign(member.name, member.incarnation, tuple(sorted(batches[member.name])))


def _shared_out(pool: Pool, keys: set[ExpertKey], room: dict[str, int]) -> dict[str, list[ExpertKey]]:
    """Each expert to one worker of its target, so that all get about as many bytes; those with few choices first."""
    batches: dict[str, list[ExpertKey]] = {name: [] for name in room}
    before = dict(room)
    for key in sorted(keys, key=lambda key: (len(pool.target[key]), key)):
        for name in sorted(pool.target[key] & room.keys(), key=lambda name: (before[name] - room[name], name)):
            if _take(pool, name, key, batches, room):
                break
    return batches


def _take(pool: Pool, name: str, key: ExpertKey, batches: dict[str, list[ExpertKey]], room: dict[str, int]) -> bool:
    """Put the expert into the worker's batch, if it has room."""
    size = pool.bytes_of([key])
    if room[name] < size:
        return False
    batches[name].append(key)
    room[name] -= size
    return True


def _probes(pool: Pool, now: float) -> Iterator[Probe]:
    for member in pool.live:
        for key in member.held.keys() - member.proven - member.proving:
            references = pool.holders(key)
            if references:
                member.proving.add(key)
                yield Probe(member.name, member.incarnation, references[0].name, key)
            else:  # whoever it was to be compared with has gone
                pool.prove(member, key, now)


def _releases(pool: Pool, now: float) -> Iterator[Release]:
    for member in pool.live:
        ready = [key for key in member.withdrawn if _may_release(pool, member, key, now)]
        if ready:
            member.releasing.update(ready)
            yield Release(member.name, member.incarnation, tuple(sorted(ready)))


def _may_release(pool: Pool, member: Member, key: ExpertKey, now: float) -> bool:
    """The expert is to go, and no engine uses a placement that still names it here.

    After an earlier controller, its engines have a while to come back before that can be said.
    """
    if member.name in pool.target[key] or key in member.releasing:
        return False
    if pool.succeeds and now - pool.began < RETURN_SECONDS:
        return False
    withdrawn = member.withdrawn[key]
    return all(
        engine.acknowledged >= withdrawn or now - engine.spoke > SILENT_SECONDS for engine in pool.engines.values()
    )


def _stops(pool: Pool) -> Iterator[Stop]:
    for member in pool.sorted_members():
        idle = not (member.stopping or member.moving)
        if member.leaving and idle and (not member.live or not (member.held or member.loading)):
            member.stopping = True
            yield Stop(member.name)


def _restarts(pool: Pool, now: float) -> Iterator[Restart]:
    for member in pool.sorted_members():
        left_alone = now - max(member.since, member.replaced_at)
        if member.reach is Reach.LOST and not member.stopping and left_alone > _patience(member):
            _replace(member, now)
            yield Restart(member.name)


def _moves(pool: Pool, now: float) -> Iterator[Move]:
    """The first time at once; then less and less often, because there seems to be no better place."""
    for member in pool.live:
        empty = not (member.held or member.loading or member.leaving)
        if member.retired and empty and now - member.replaced_at > _patience(member):
            _replace(member, now)
            member.moving = True
            yield Move(member.name)


def _patience(member: Member) -> float:
    """Seconds for a process that has replaced another one; its successor may only be slow to start."""
    return HUNG_SECONDS * 2.0**member.replaced


def _replace(member: Member, now: float) -> None:
    member.replaced_at = now
    member.replaced += 1
