"""The planner's last step: even out the load of each layer over the workers, by moves that pay."""

from __future__ import annotations

import numpy as np

from barista.draft import Bools, Draft, Floats, Ints

PAYS = 0.02
"""A load must take at least this share of the average worker's load off a layer's busiest worker."""
EPSILON = 1e-9
"""Differences below this share of the average load are rounding."""


def even_out(draft: Draft, redundancy: int, budget: int | None) -> None:
    """Relieve each layer's busiest worker while that pays: move a replica, swap two, or add one where memory is left.

    Every action lowers the busier and keeps the other of its two workers below what the busier had, so this ends. Each
    can be carried out with the memory there is: only a replica whose expert has another gives up its place beforehand.
    """
    changed = True
    while changed:
        changed = _prune(draft, redundancy)
        active = list(range(len(draft.rows)))
        while active:
            active = [layer for layer in active if _relieve(draft, layer, redundancy, budget)]
            changed |= bool(active)


def _prune(draft: Draft, redundancy: int) -> bool:
    """Drop surplus replicas that no longer matter from workers without room for another expert."""
    changed = False
    surplus = (draft.count > redundancy).nonzero()[0]
    for expert in surplus[np.argsort(draft.weight[surplus], kind="stable")]:
        loads = draft.load[draft.layer[expert]]
        for worker in draft.held[expert].nonzero()[0]:
            count = draft.count[expert]
            if count <= redundancy or draft.free[worker] >= draft.bytes[expert]:
                continue
            others = draft.held[expert].copy()
            others[worker] = False
            more = draft.weight[expert] / (count - 1) - draft.weight[expert] / count
            nodes = draft.nodes_of(int(expert))
            alone = nodes[draft.node[worker]] == 1 and (nodes > 0).sum() <= redundancy
            if not alone and (loads[others] + more <= loads.mean() * (1 + EPSILON)).all():
                draft.drop(int(expert), int(worker))
                changed = True
    return changed


def _relieve(draft: Draft, layer: int, redundancy: int, budget: int | None) -> bool:
    """Carry out the best action for the layer's busiest worker; False if none pays."""
    loads = draft.load[layer]
    if loads.max() <= loads.mean() * (1 + EPSILON):
        return False
    left = np.inf if budget is None else budget - draft.loads
    for busiest in (loads >= loads.max() * (1 - EPSILON)).nonzero()[0]:
        if _act(draft, layer, int(busiest), redundancy, left):
            return True
    return False


def _act(draft: Draft, layer: int, busiest: int, redundancy: int, left: float) -> bool:
    rows = draft.rows[layer]
    held, count, weight = draft.held[rows], draft.count[rows], draft.weight[rows]
    here = held[:, busiest].nonzero()[0]
    if not len(here):
        return False
    loads = draft.load[layer]
    mean = loads.mean()
    share = weight / np.maximum(count, 1)
    arriving = (~draft.old[rows]).astype(np.int64)
    movable = _may_move(draft, rows, here, busiest)
    room = ~held[here] & (draft.free >= draft.bytes[rows.start])[None, :]

    def score(relief: Floats, partner: Floats, cost: Ints, allowed: Bools) -> Floats:
        gain = loads[busiest] - np.maximum(loads[busiest] - relief, partner)
        worth = gain - PAYS * mean * np.maximum(cost, 0)
        return np.where(allowed & (cost <= left) & (gain > EPSILON * mean), worth, -np.inf)

    gone = arriving[here, busiest][:, None]
    moved = share[here][:, None]
    move = score(moved, loads[None, :] + moved, arriving[here] - gone, room & movable)
    thinner = (weight[here] / (count[here] + 1))[:, None]
    add = score(moved - thinner, loads[None, :] + thinner, arriving[here], room)

    experts, partners = (held & ~held[:, [busiest]]).nonzero()
    difference = moved - share[experts][None, :]
    cost = arriving[here][:, partners] - gone + (arriving[experts, busiest] - arriving[experts, partners])[None, :]
    # One of the two must go before the other can come, so its expert needs another replica.
    allowed = ~held[here][:, partners] & movable[:, partners] & _may_come(draft, rows, experts, partners, busiest)[None]
    allowed &= (count[here] > 1)[:, None] | (count[experts] > 1)[None, :]
    swap = score(difference, loads[partners][None, :] + difference, cost, allowed & (difference > 0))

    best = [float(table.max(initial=-np.inf)) for table in (move, swap, add)]
    chosen = int(np.argmax(best))
    if best[chosen] <= EPSILON * mean:
        return False
    table = (move, swap, add)[chosen]
    row, column = divmod(int(table.argmax()), table.shape[1])
    expert, first = int(here[row]) + rows.start, rows.start
    worker = int(partners[column]) if chosen == 1 else column
    if chosen != 2:
        draft.drop(expert, busiest)
    draft.place(expert, worker)
    if chosen == 1:
        draft.drop(int(experts[column]) + first, worker)
        draft.place(int(experts[column]) + first, busiest)
    return True


def _may_move(draft: Draft, rows: slice, here: Ints, busiest: int) -> Bools:
    """[here, W]: whether an expert that leaves the busiest worker for another is then on no fewer nodes."""
    nodes = draft.nodes_of(rows)[here]
    leaves = nodes[:, draft.node[busiest]][:, None] == 1
    same = (draft.node == draft.node[busiest])[None, :]
    return np.asarray(same | ~leaves | (nodes[:, draft.node] == 0))


def _may_come(draft: Draft, rows: slice, experts: Ints, partners: Ints, busiest: int) -> Bools:
    """[pairs]: the same for the experts that leave their worker for the busiest."""
    nodes = draft.nodes_of(rows)[experts]
    pairs = np.arange(len(experts))
    leaves = nodes[pairs, draft.node[partners]] == 1
    same = draft.node[partners] == draft.node[busiest]
    return np.asarray(same | ~leaves | (nodes[:, draft.node[busiest]] == 0))
