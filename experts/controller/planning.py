"""Who shall hold which expert, as workers come and go: the pool's target, by barista.balance."""

from __future__ import annotations

import math
from collections.abc import Collection

from barista.balance import Plan, Policy, plan
from barista.cache import size
from barista.placement import Placement, WorkerCapacity
from experts.controller.member import Member, Reach
from experts.controller.state import Pool

START_SECONDS = 10.0  # the first plan waits so long for workers that are slower to start than the first
GRACE_SECONDS = 10.0  # a lost worker keeps its claim on its experts for so long


def tend(pool: Pool, now: float) -> None:
    """Publish what was proven and make the target fit the workers that there are. Cheap when nothing has changed."""
    pool.publish_proven(now)
    if not pool.planned_for and _more_are_coming(pool, now):
        return
    for member in pool.members.values():
        if member.reach is Reach.LOST and now - member.since > GRACE_SECONDS:
            member.given_up = True
    if frozenset(member.name for member in eligible(pool)) != pool.planned_for:
        replan(pool, now)
    _cover_at_once(pool, now)


def eligible(pool: Pool, *, without: Collection[str] = ()) -> list[Member]:
    """Members that may be given experts: those that answer, and those lost just now, which Ray restarts."""
    return [
        member
        for member in pool.sorted_members()
        if member.reach in (Reach.LIVE, Reach.LOST)
        and member.capacity_bytes
        and not (member.given_up or member.draining or member.name in without)
    ]


def plan_for(pool: Pool, members: list[Member], move_budget: int | None = None, policy: Policy = "incremental") -> Plan:
    """The best placement on these members, from what they hold and shall hold. Raises ValueError, as `plan`."""
    names = {member.name for member in members}
    holding = {key: set(target & names) for key, target in pool.target.items()}
    for member in members:
        if member.live:
            for key in member.held:
                holding[key].add(member.name)
    order = [member.name for member in members]
    replicas = {key: tuple(name for name in order if name in held) for key, held in holding.items()}
    return plan(
        pool.load,
        Placement(pool.epoch, replicas, {}),
        [WorkerCapacity(member.name, member.capacity_bytes, member.node, member.domain) for member in members],
        pool.settings.expert_bytes,
        redundancy=pool.settings.redundancy,
        move_budget=move_budget,
        policy=policy,
    )


def replan(pool: Pool, now: float) -> None:
    """Set the target anew for the members that there are."""
    members = eligible(pool)
    made = plan_for(pool, members)
    pool.planned_for = frozenset(member.name for member in members)
    pool.missing_bytes = made.missing_bytes
    pool.set_target(made.target, now)


def problem(pool: Pool) -> str:
    """Why coverage is not complete and what would help, for people; empty if it is."""
    uncovered = len(pool.placement.uncovered())
    if not uncovered:
        return ""
    trouble = [f"{member.name}: {member.detail}" for member in pool.sorted_members() if member.detail]
    if pool.missing_bytes and pool.planned_for:
        return " ".join([_too_small(pool), *trouble])
    if not pool.live:
        return " ".join(["No worker is ready.", *trouble])
    return " ".join([f"{uncovered} of {len(pool.target)} experts are not loaded yet.", *trouble])


def shortage(pool: Pool, missing_bytes: int) -> str:
    """So many bytes lack, and where they could come from."""
    capacities = [member.capacity_bytes for member in pool.members.values() if member.capacity_bytes]
    typical = max(1, sum(capacities) // max(1, len(capacities)))
    return (
        f"{missing_bytes} bytes of memory for experts ({size(missing_bytes)}) are missing: "
        f"{math.ceil(missing_bytes / typical)} more workers like these would do (barista scale), "
        "or more --worker-memory."
    )


def _too_small(pool: Pool) -> str:
    needed = pool.bytes_of(pool.target)
    per_worker = math.ceil(needed / max(1, len(pool.planned_for))) + max(pool.settings.expert_bytes.values())
    return (
        f"The experts need {size(needed)} and do not fit: {shortage(pool, pool.missing_bytes)} "
        f"With {len(pool.planned_for)} workers, --worker-memory {per_worker} is enough."
    )


def _more_are_coming(pool: Pool, now: float) -> bool:
    live = pool.live
    starting = any(member.reach is Reach.STARTING for member in pool.members.values())
    return not live or (starting and now - min(member.since for member in live) < START_SECONDS)


def _cover_at_once(pool: Pool, now: float) -> None:
    """Give what no live worker holds or shall hold to a survivor with room; without room, plan without the lost."""
    live = [member for member in eligible(pool) if member.live]
    names = {member.name for member in pool.live}
    orphans = [key for key in pool.placement.uncovered() if names.isdisjoint(pool.target[key])]
    if not orphans or not live:
        return
    room = {member.name: pool.free_bytes(member) - pool.bytes_of(_not_begun(pool, member)) for member in live}
    target = dict(pool.target)
    for key in orphans:
        best = max(room, key=lambda name: room[name])
        needed = pool.bytes_of([key])
        if room[best] < needed:
            break
        target[key] |= {best}
        room[best] -= needed
    else:
        pool.set_target(target, now)
        return
    lost = [member for member in eligible(pool) if not member.live]
    for member in lost:
        member.given_up = True
    if lost:
        replan(pool, now)


def _not_begun(pool: Pool, member: Member) -> list[tuple[int, int]]:
    return [key for key in pool.pending(member) if key not in member.loading]
