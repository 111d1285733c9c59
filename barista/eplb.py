"""DeepSeek's expert-parallel load balancer (github.com/deepseek-ai/EPLB); our own writing of it in numpy.

Three greedy steps: pack groups of experts onto nodes, replicate the busiest experts within each node, pack the replicas
onto the node's GPUs. Where the nodes do not divide the groups, the whole pool is taken as one node with one group.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from barista.draft import Draft

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def rebalance_experts(
    weight: Floats | Ints, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Ints, Ints, Ints]:
    """Replicate and place the experts of each layer by their load.

    weight: [layers, experts], load. Returns (phy2log [layers, num_replicas]: the expert in each slot, slots of one GPU
    side by side; log2phy [layers, experts, most replicas of any]: its slots, padded with -1; logcnt [layers, experts]:
    how many). Raises ValueError where the numbers do not divide evenly or the replicas are fewer than the experts.
    """
    loads = np.asarray(weight, np.float32)
    num_layers, num_experts = loads.shape
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    _check_shape(num_experts, num_replicas, num_groups, num_nodes, num_gpus)
    phy2log = np.empty((num_layers, num_replicas), np.int64)
    rank = np.empty_like(phy2log)
    logcnt = np.empty((num_layers, num_experts), np.int64)
    for layer, load in enumerate(loads):
        phy2log[layer], rank[layer], logcnt[layer] = _place_layer(load, num_replicas, num_groups, num_nodes, num_gpus)
    log2phy = np.full((num_layers, num_experts, int(logcnt.max())), -1, np.int64)
    log2phy[np.arange(num_layers)[:, None], phy2log, rank] = np.arange(num_replicas)
    return phy2log, log2phy, logcnt


def place_afresh(draft: Draft) -> None:
    """Give the workers of a draft the replicas that EPLB asks for, so mapped that many of them are held already.

    Every worker gets as many slots in every layer, as the smallest can hold. Two replicas of an expert on one worker
    are one. Raises ValueError where experts differ in size or number between layers, or the slots are too few.
    """
    num_workers = len(draft.workers)
    sizes, counts = set(draft.bytes.tolist()), {rows.stop - rows.start for rows in draft.rows}
    if len(sizes) != 1 or len(counts) != 1:
        raise ValueError(
            f"EPLB needs equal slots, but experts have {sorted(sizes)} bytes, layers {sorted(counts)} experts"
        )
    num_experts, slot_bytes = counts.pop(), sizes.pop()
    smallest = int(draft.capacity.min(initial=np.iinfo(np.int64).max)) if num_workers else 0
    slots = min(smallest // (slot_bytes * len(draft.rows)), num_experts)
    if slots * num_workers < num_experts:
        raise ValueError(
            f"EPLB needs equal slots: {num_workers} workers with {slots} in each layer, which is what the "
            f"smallest has memory for, do not hold {num_experts} experts"
        )
    weight = draft.weight.reshape(len(draft.rows), num_experts)
    phy2log, _, _ = rebalance_experts(weight, num_workers * slots, 1, 1, num_workers)
    for rows, experts in zip(draft.rows, phy2log.reshape(-1, num_workers, slots), strict=True):
        wanted = np.zeros((num_workers, num_experts), np.bool_)
        np.put_along_axis(wanted, experts, True, axis=1)
        held = draft.held[rows]
        for pack, worker in _match(wanted.astype(np.int64) @ held):
            for expert in (wanted[pack] & ~held[:, worker]).nonzero()[0]:
                draft.place(rows.start + int(expert), worker)
            for expert in (~wanted[pack] & held[:, worker]).nonzero()[0]:
                draft.drop(rows.start + int(expert), worker)


def _match(overlap: Ints) -> list[tuple[int, int]]:
    """Pair every pack with a worker, the greatest overlap [packs, workers] first; ties: the first."""
    left = overlap.copy()
    pairs = []
    for _ in range(len(left)):
        pack, worker = divmod(int(left.argmax()), left.shape[1])
        left[pack, :] = left[:, worker] = -1
        pairs.append((pack, worker))
    return pairs


def _check_shape(num_experts: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> None:
    if num_replicas < num_experts:
        raise ValueError(f"{num_experts} experts do not fit {num_replicas} slots")
    for what, total, parts in (
        ("groups", num_experts, num_groups),
        ("nodes", num_gpus, num_nodes),
        ("GPUs", num_replicas, num_gpus),
    ):
        if total % parts:
            raise ValueError(f"EPLB needs equal shares, and {parts} {what} do not divide {total}")


def _place_layer(
    load: NDArray[np.float32], num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Ints, Ints, Ints]:
    """One layer: (expert by slot, which replica of that expert it is, replicas by expert)."""
    groups = np.arange(len(load)).reshape(num_groups, -1)
    phy2log, ranks = [], []
    logcnt = np.empty(len(load), np.int64)
    for node_groups in _pack(load[groups].sum(1), num_nodes):
        experts = groups[node_groups].ravel()
        replicas, rank, count = _replicate(load[experts], num_replicas // num_nodes)
        logcnt[experts] = count
        share = (load[experts] / count).astype(np.float32)
        slots = np.concatenate(_pack(share[replicas], num_gpus // num_nodes))
        phy2log.append(experts[replicas[slots]])
        ranks.append(rank[slots])
    return np.concatenate(phy2log), np.concatenate(ranks), logcnt


def _pack(load: NDArray[np.float32], num_packs: int) -> list[Ints]:
    """The items of each pack: as many in each, heaviest first into the lightest pack that has room; ties: the first."""
    per_pack = len(load) // num_packs
    if per_pack == 1:
        return [np.array([item], np.int64) for item in range(len(load))]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    packed = [np.float32(0)] * num_packs
    for item in np.argsort(-load, kind="stable"):
        pack = min((p for p in range(num_packs) if len(packs[p]) < per_pack), key=packed.__getitem__)
        packs[pack].append(int(item))
        packed[pack] += load[item]
    return [np.array(pack, np.int64) for pack in packs]


def _replicate(load: NDArray[np.float32], num_replicas: int) -> tuple[Ints, Ints, Ints]:
    """Every expert once, then one more of the busiest at a time: (expert, rank) by replica, replicas by expert."""
    expert = np.arange(num_replicas)
    rank = np.zeros(num_replicas, np.int64)
    count = np.ones(len(load), np.int64)
    for replica in range(len(load), num_replicas):
        busiest = int(np.argmax(load / count))
        expert[replica], rank[replica] = busiest, count[busiest]
        count[busiest] += 1
    return expert, rank, count
