"""The planner's first steps: every expert somewhere, then every expert on enough workers, the hot ones first."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from barista.draft import Bools, Draft, Ints

MUCH_HOTTER = 2.0
"""By how much an expert must be hotter than another to take the room of its redundant replica."""
MAX_FAILED_SHIFTS = 16
"""After so many failures to find room by shifting a replica, memory is taken to be full."""


def shed(draft: Draft) -> None:
    """Bring workers that hold more than their capacity back to it: redundant replicas go first, then cold ones."""
    for worker in (draft.free < 0).nonzero()[0]:
        while draft.free[worker] < 0:
            draft.drop(_coldest(draft, draft.held[:, worker], keep=1), int(worker))
    draft.anchored = draft.count > 0
    draft.loads = 0


def cover(draft: Draft, redundancy: int) -> None:
    """Load every expert that no worker holds where it adds least to the load, if need be in a redundant replica's room.

    If the memory is too small for all, as many as fit.
    """
    todo = (draft.count == 0).nonzero()[0]
    for expert, quota in _in_order(draft, todo, fits=draft.bytes[todo].sum() <= draft.free.sum()):
        worker = _least_loaded(draft, expert, draft.free >= draft.bytes[expert], quota)
        if worker is None:
            worker = _evict(draft, expert, redundancy)
        if worker is not None:
            draft.place(expert, worker)


def add_redundancy(draft: Draft, redundancy: int, budget: int | None) -> None:
    """Replicas up to `redundancy`, on different nodes where there are several; the hot experts first if not all can.

    Of the other nodes, those in a domain without a replica come first: a preference, for which nothing is shifted.
    """
    shifts_failed = 0
    for level in range(2, redundancy + 1):
        spread = (draft.nodes_of(slice(None)) > 0).sum(1)
        lacking = (draft.count < level) | (spread < min(level, draft.num_nodes))
        todo = ((draft.count > 0) & lacking).nonzero()[0]
        fits = draft.bytes[todo].sum() <= draft.free.sum() and (budget is None or draft.loads + len(todo) <= budget)
        for expert, quota in _in_order(draft, todo, fits):
            if budget is not None and draft.loads >= budget:
                return
            elsewhere = draft.nodes_of(expert)[draft.node] == 0
            room = draft.free >= draft.bytes[expert]
            worker = None
            if draft.num_domains > 1:
                afar = ~np.isin(draft.domain, draft.domain[draft.held[expert]])
                worker = _least_loaded(draft, expert, room & elsewhere & afar, quota)
            if worker is None:
                worker = _least_loaded(draft, expert, room & elsewhere, quota)
            if worker is None and shifts_failed < MAX_FAILED_SHIFTS:
                worker = _shift(draft, expert, elsewhere, budget)
                shifts_failed += worker is None
            if worker is None and draft.count[expert] < level:
                worker = _least_loaded(draft, expert, room, quota)
                if worker is None and shifts_failed < MAX_FAILED_SHIFTS:
                    worker = _shift(draft, expert, np.ones_like(room), budget)
                    shifts_failed += worker is None
            if worker is not None:
                draft.place(expert, worker)
        _prefer_hot(draft, level, budget)


def _in_order(draft: Draft, todo: Ints, fits: bool) -> Iterator[tuple[int, Ints | None]]:
    """(expert, bytes that each worker should keep for the layers to come), for each expert in the order of placing.

    If all fit: layer by layer, large experts first; else small ones first, and of these the hot ones, keeping nothing.
    """
    weight, size, layer = draft.weight[todo], draft.bytes[todo], draft.layer[todo]
    if not fits:
        for expert in todo[np.lexsort((todo, -weight, size))]:
            yield int(expert), None
        return
    left = int(size.sum())
    current, quota = -1, draft.free
    for place in np.lexsort((todo, -weight, layer, -size)):
        expert = int(todo[place])
        if layer[place] != current:
            current = layer[place]
            need = int(size[layer == current].sum())
            quota = draft.free - np.maximum(draft.free * (need / left), draft.bytes[expert]).astype(np.int64)
            left -= need
        yield expert, quota


def _least_loaded(draft: Draft, expert: int, allowed: Bools, floor: Ints | None) -> int | None:
    """The allowed worker without this expert that has least to do in its layer, then most memory left.

    Workers whose free memory would fall below `floor` come last.
    """
    candidates = (allowed & ~draft.held[expert]).nonzero()[0]
    if not len(candidates):
        return None
    free = draft.free[candidates]
    over = free - draft.bytes[expert] < floor[candidates] if floor is not None else np.zeros(len(free), np.bool_)
    load = np.round(draft.load[draft.layer[expert]][candidates], 9)
    return int(candidates[np.lexsort((-free, load, over))[0]])


def _coldest(draft: Draft, among: Bools, keep: int) -> int:
    """The expert of those to give up a replica of first: one with more than `keep` replicas, then the least load."""
    rows = among.nonzero()[0]
    return int(rows[np.lexsort((draft.weight[rows], draft.count[rows] <= keep))[0]])


def _evict(draft: Draft, expert: int, redundancy: int) -> int | None:
    """Drop redundant replicas from the worker with most room in them, until the expert fits there."""
    redundant = draft.count > 1
    if not redundant.any():
        return None
    spare = draft.held & redundant[:, None]
    room = draft.free + draft.bytes @ spare
    worker = int(room.argmax())
    if room[worker] < draft.bytes[expert]:
        return None
    while draft.free[worker] < draft.bytes[expert]:
        spare = draft.held[:, worker] & (draft.count > 1)
        draft.drop(_coldest(draft, spare, redundancy), worker)
    return worker


def _shift(draft: Draft, expert: int, allowed: Bools, budget: int | None) -> int | None:
    """Free an allowed worker for the expert by shifting one of its replicas to a worker with room; None if none can."""
    need = draft.bytes[expert]
    old_elsewhere = (draft.held & draft.old).sum(1)
    for target in (allowed & ~draft.held[expert]).nonzero()[0]:
        here = draft.held[:, target]
        free_to_go = ~draft.old[:, target]
        if budget is None or draft.loads + 2 <= budget:
            # Its expert is never without a replica, even if this one must go before the new one has come.
            free_to_go = free_to_go | (old_elsewhere > 1)
        movable = here & free_to_go & (draft.bytes + draft.free[target] >= need)
        for other in (draft.free > 0).nonzero()[0]:
            fits = movable & ~draft.held[:, other] & (draft.bytes <= draft.free[other])
            if draft.node[other] != draft.node[target]:
                fits &= ~draft.held[:, draft.node == draft.node[other]].any(1)
            if fits.any():
                moved = int(fits.argmax())
                draft.drop(moved, int(target))
                draft.place(moved, int(other))
                return int(target)
    return None


def _prefer_hot(draft: Draft, level: int, budget: int | None) -> None:
    """Let experts that lack a replica take the room of surplus ones, and of much colder experts' redundant ones."""
    hot = (draft.count == level - 1).nonzero()[0]
    cold = (draft.count >= level).nonzero()[0]
    if not len(hot) or not len(cold):
        return
    surplus = draft.count[cold] > level
    cold = cold[np.lexsort((draft.weight[cold], ~surplus))]
    victims = iter([int(row) for row in cold])
    victim = next(victims)
    for expert in hot[np.argsort(-draft.weight[hot], kind="stable")]:
        while budget is None or draft.loads < budget:
            much_colder = draft.weight[expert] > MUCH_HOTTER * draft.weight[victim]
            if draft.count[victim] >= level and (much_colder or draft.count[victim] > level):
                room = draft.held[victim] & (draft.free + draft.bytes[victim] >= draft.bytes[expert])
                worker = _least_loaded(draft, int(expert), room, None)
                if worker is not None:
                    draft.drop(victim, worker)
                    draft.place(int(expert), worker)
                    break
            following = next(victims, None)
            if following is None:
                return
            victim = following
        else:
            return
