"""What operators ask for: drain, scale, rebalance. Each is checked, begun, and over at some time, well or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from barista.balance import Plan
from experts.controller.member import Reach, number_of
from experts.controller.planning import eligible, plan_for, shortage, tend
from experts.controller.reconcile import is_settled
from experts.controller.state import Pool

STALL_SECONDS = 60.0
DEFAULT_MOVE_BUDGET = 64


class Refused(Exception):
    """The command cannot be done now; the message names the remedy. unknown: it names a worker that is not there."""

    def __init__(self, message: str, *, unknown: bool = False) -> None:
        super().__init__(message)
        self.unknown = unknown


@dataclass(frozen=True, slots=True)
class MovedReplica:
    """One change of a placement. source: empty for a new replica; destination: empty for one that is released."""

    layer: int
    expert: int
    source: str
    destination: str


class Command:
    """A command that was begun. started: the workers that it added, which are to be started."""

    def __init__(
        self, pool: Pool, what: str, over: Callable[[], bool], now: float, started: list[str] | None = None
    ) -> None:
        self.started = started or []
        self._pool = pool
        self._what = what
        self._over = over
        self._mark: object = None
        self._since = now

    def is_over(self, now: float) -> bool:
        """True when it is done. Raises Refused when nothing has happened for a minute; the pool then stays as it is."""
        if self._over():
            return True
        members = [(member.name, member.reach, len(member.held)) for member in self._pool.sorted_members()]
        mark = (self._pool.moves, self._pool.epoch, members)
        if mark != self._mark:
            self._mark, self._since = mark, now
        if now - self._since <= STALL_SECONDS:
            return False
        self._give_up(now)
        raise Refused(f"{self._what} did not come to an end; the pool stays as it is. See `barista status`.")

    def _give_up(self, now: float) -> None:
        """What is held is what shall be held."""
        for member in self._pool.members.values():
            member.leaving = False
            member.draining = member.draining and not member.held
        live = {member.name: member for member in self._pool.live}
        self._pool.set_target(
            {key: [name for name, member in live.items() if key in member.held] for key in self._pool.target}, now
        )
        self._pool.planned_for = frozenset(member.name for member in eligible(self._pool))


def begin_drain(pool: Pool, name: str, now: float) -> Command:
    """Move every expert off a worker. Raises Refused."""
    if name not in pool.members:
        names = ", ".join(member.name for member in pool.sorted_members())
        raise Refused(f"There is no worker {name!r}. The workers are {names}.", unknown=True)
    return _drain(pool, [name], now)


def begin_drain_node(pool: Pool, node: str, now: float) -> Command:
    """Move every expert off the workers of a node, none of them to another one there. Raises Refused."""
    names = [member.name for member in pool.sorted_members() if member.node == node]
    if not names:
        raise Refused(f"No worker is on the node {node!r}.", unknown=True)
    return _drain(pool, names, now)


def _drain(pool: Pool, names: list[str], now: float) -> Command:
    what = ", ".join(names)
    new = [name for name in names if not pool.members[name].draining]
    if new:
        _require_coverage(pool, f"{what} cannot be drained")
        _require_room(pool, new, f"Draining {what}")
        for name in new:
            pool.members[name].draining = True
        tend(pool, now)
    for name in names:
        pool.members[name].retired = False  # from now on it is whoever drains it that says when it ends
    return Command(pool, f"Draining {what}", lambda: all(_is_empty(pool, name) for name in names), now)


def begin_scale(pool: Pool, count: int, now: float) -> Command:
    """Start workers, or stop some until there are `count`: drained ones first, then those of the highest numbers.

    Raises Refused.
    """
    if count < 1:
        raise Refused(f"A pool of {count} workers cannot hold an expert. Ask for 1 or more.")
    staying = [member.name for member in pool.sorted_members() if not member.leaving]
    what = f"Scaling to {count} workers"
    if count >= len(staying):
        started = pool.add(count - len(staying), now)
        return Command(pool, what, lambda: _have_joined(pool, started), now, started)
    doomed = sorted(staying, key=lambda name: (not pool.members[name].draining, -number_of(name)))[
        : len(staying) - count
    ]
    _require_coverage(pool, "Workers cannot be stopped")
    _require_room(pool, doomed, what)
    for name in doomed:
        pool.members[name].draining = pool.members[name].leaving = True
    tend(pool, now)
    return Command(pool, what, lambda: pool.members.keys().isdisjoint(doomed), now)


def begin_rebalance(
    pool: Pool, move_budget: int, now: float, *, dry_run: bool, policy: str = "incremental"
) -> tuple[Plan, list[MovedReplica], Command]:
    """Even out the load that engines have reported, by a policy of barista.balance.

    move_budget: 0 for the default, which is none for EPLB. Raises Refused.
    """
    _require_coverage(pool, "The pool cannot be rebalanced")
    try:
        match policy:
            case "incremental":
                made = plan_for(pool, eligible(pool), move_budget or DEFAULT_MOVE_BUDGET)
            case "eplb":
                made = plan_for(pool, eligible(pool), move_budget or None, "eplb")
            case _:
                raise ValueError(f"there is no policy {policy!r}; take incremental or eplb")
    except ValueError as error:
        raise Refused(f"The pool cannot be rebalanced: {error}.") from error
    if made.missing_bytes:
        raise Refused(f"The pool cannot be rebalanced. {shortage(pool, made.missing_bytes)}")
    if not dry_run:
        pool.set_target(made.target, now)
    return made, moves_of(made), Command(pool, "Rebalancing", lambda: dry_run or is_settled(pool), now)


def moves_of(made: Plan) -> list[MovedReplica]:
    """A plan's loads and releases, in pairs where an expert goes from one worker to another."""
    sources: dict[tuple[int, int], list[str]] = {}
    for release in made.releases:
        sources.setdefault(release.key, []).append(release.worker)
    moves = []
    for load in made.loads:
        left = sources.get(load.key)
        moves.append(MovedReplica(*load.key, left.pop(0) if left else "", load.worker))
    moves += [MovedReplica(*key, name, "") for key, names in sources.items() for name in names]
    return sorted(moves, key=lambda move: (move.layer, move.expert, move.source, move.destination))


def _is_empty(pool: Pool, name: str) -> bool:
    member = pool.members.get(name)
    return member is None or (member.draining and not member.held and not member.loading)


def _have_joined(pool: Pool, names: list[str]) -> bool:
    members = [pool.members[name] for name in names if name in pool.members]
    if any(member.reach in (Reach.STARTING, Reach.LOST) for member in members):
        return False
    live = {member.name for member in members if member.live}
    return not live or (live <= pool.planned_for and is_settled(pool))


def _require_coverage(pool: Pool, consequence: str) -> None:
    uncovered = len(pool.placement.uncovered())
    if uncovered or not pool.target:
        raise Refused(
            f"{consequence} while {uncovered} of {len(pool.target)} experts have no live worker. "
            "Wait until `barista status` shows full coverage, or add workers with `barista scale`."
        )


def _require_room(pool: Pool, without: list[str], what: str) -> None:
    missing = plan_for(pool, eligible(pool, without=without)).missing_bytes
    if missing:
        raise Refused(f"{what} would uncover experts. {shortage(pool, missing)}")
