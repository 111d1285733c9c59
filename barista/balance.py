"""Where the experts should be: a pure plan of loads and releases from the load, the placement and the workers' memory.

Two policies. "incremental" covers every expert, then gives each its redundant replicas, then evens out the load with as
few moves as pay. "eplb" is DeepSeek's balancer, which thinks afresh, mapped onto the workers so that few replicas move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from barista.draft import Draft
from barista.eplb import place_afresh
from barista.evening import even_out
from barista.placement import ExpertKey, Placement, WorkerCapacity
from barista.replication import add_redundancy, cover, shed

MAX_ROUNDS = 8

Policy = Literal["incremental", "eplb"]


class Load(NamedTuple):
    """A replica to be loaded."""

    worker: str
    key: ExpertKey


class Release(NamedTuple):
    """A replica to be released, once the loads are done or its expert has another replica."""

    worker: str
    key: ExpertKey


@dataclass(frozen=True)
class Plan:
    """What to load and release, in layer order, and how things are then.

    target: workers by expert, in the order of the workers given. imbalance: busiest over average worker, by load,
    summed over the layers, an expert's load shared equally by its replicas; 1 is even. uncovered: experts that no
    worker has memory for; missing_bytes: what these need.
    """

    loads: tuple[Load, ...]
    releases: tuple[Release, ...]
    target: Mapping[ExpertKey, tuple[str, ...]]
    imbalance_before: float
    imbalance_after: float
    missing_bytes: int
    uncovered: tuple[ExpertKey, ...]


def plan(
    load: Mapping[ExpertKey, float],
    placement: Placement,
    workers: Sequence[WorkerCapacity],
    expert_bytes: Mapping[int, int],
    *,
    redundancy: int,
    move_budget: int | None = None,
    policy: Policy = "incremental",
) -> Plan:
    """Plan the next placement on `workers`. Replicas on any other worker do not count and are released.

    load: tokens by expert; what is absent counts as 0, a layer without any as evenly loaded. expert_bytes: by layer.
    redundancy: replicas that each expert should have, on different nodes where there are several. move_budget: the most
    loads beyond those that coverage needs; None: no limit. Ties go by expert, then by the order of `workers`.
    Raises ValueError for two workers of one name, redundancy below 1, or what EPLB cannot do: unequal slots, a budget.
    """
    names = [worker.name for worker in workers]
    if len(set(names)) != len(names):
        raise ValueError(f"two workers of one name: {names}")
    if redundancy < 1:
        raise ValueError(f"redundancy is {redundancy}: an expert needs at least one replica")
    draft = Draft(load, placement, workers, expert_bytes)
    before = draft.imbalance()
    if policy == "eplb":
        if move_budget is not None:
            raise ValueError(
                "EPLB places every expert afresh and cannot keep a move budget: use the incremental policy"
            )
        place_afresh(draft)
    elif workers:
        _improve(draft, min(redundancy, len(workers)), move_budget)
    return _result(draft, placement, before)


def _improve(draft: Draft, redundancy: int, move_budget: int | None) -> None:
    """All steps until none changes anything: room that one step leaves may be what an earlier one lacked."""
    shed(draft)
    for _ in range(MAX_ROUNDS):
        held = draft.held.copy()
        cover(draft, redundancy)
        add_redundancy(draft, redundancy, move_budget)
        even_out(draft, redundancy, move_budget)
        if (held == draft.held).all():
            return


def _result(draft: Draft, placement: Placement, imbalance_before: float) -> Plan:
    live = set(draft.workers)
    target: dict[ExpertKey, tuple[str, ...]] = {}
    loads, releases = [], []
    for row, key in enumerate(draft.keys):
        target[key] = tuple(draft.workers[w] for w in draft.held[row].nonzero()[0])
        loads += [Load(draft.workers[w], key) for w in (draft.held[row] & ~draft.old[row]).nonzero()[0]]
        releases += [Release(name, key) for name in placement.replicas[key] if name not in live]
        releases += [Release(draft.workers[w], key) for w in (draft.old[row] & ~draft.held[row]).nonzero()[0]]
    empty = (draft.count == 0).nonzero()[0]
    return Plan(
        loads=tuple(loads),
        releases=tuple(releases),
        target=target,
        imbalance_before=imbalance_before,
        imbalance_after=draft.imbalance(),
        missing_bytes=int(draft.bytes[empty].sum()),
        uncovered=tuple(draft.keys[row] for row in empty),
    )
