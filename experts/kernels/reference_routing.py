"""experts.kernels.routing in plain Python: the oracle of the tests, and the stand-in where nothing can be compiled."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def route(topk_ids: Tensor | np.ndarray, replicas: np.ndarray, cost: np.ndarray, expert_cost: float) -> np.ndarray:
    """See experts.kernels.route."""
    rows = _count_rows(topk_ids, len(replicas))
    owner = np.full(len(replicas), -1, np.int32)
    holders: dict[int, list[int]] = {}
    for expert in rows.nonzero()[0].tolist():
        workers = [worker for worker in replicas[expert].tolist() if worker != -1]
        if not all(0 <= worker < len(cost) for worker in workers):
            raise ValueError(f"a worker is not among {len(cost)}")
        owner[expert] = -2
        if workers:
            holders[expert] = workers
    finish = [0.0] * len(cost)
    for expert in sorted(holders, key=lambda e: (len(holders[e]) > 1, -rows[e], e)):
        work = expert_cost + float(rows[expert])
        finishing = {worker: finish[worker] + work * float(cost[worker]) for worker in sorted(holders[expert])}
        best = min(finishing, key=finishing.__getitem__)
        finish[best] = finishing[best]
        owner[expert] = best
    return owner


def split(topk_ids: Tensor | np.ndarray, owner: np.ndarray, worker: int) -> tuple[np.ndarray, np.ndarray, int]:
    """See experts.kernels.split."""
    _count_rows(topk_ids, len(owner))
    topk_ids = np.asarray(topk_ids)
    mine = (topk_ids >= 0) & (owner[topk_ids] == worker)
    tokens = mine.any(-1).nonzero()[0]
    ids = np.where(mine, topk_ids, np.int32(-1))[tokens]
    return tokens.astype(np.int32), ids, int(mine.sum())


def place_rows(addresses: np.ndarray, tokens: np.ndarray, ids: np.ndarray, base: int, row_bytes: int) -> int:
    """See experts.kernels.place_rows."""
    if not all(0 <= token < len(addresses) for token in tokens.tolist()):
        raise ValueError(f"a token is not among {len(addresses)}")
    rows, places = (ids >= 0).nonzero()
    addresses[tokens[rows], places] = base + row_bytes * np.arange(len(rows))
    return len(rows)


def _count_rows(topk_ids: Tensor | np.ndarray, num_experts: int) -> np.ndarray:
    """How often each expert is asked for, [num_experts]. Raises ValueError when an id is out of range."""
    ids = np.asarray(topk_ids).ravel()
    if ids.size and not (ids.min() >= -1 and ids.max() < num_experts):
        raise ValueError(f"an expert is not among {num_experts}")
    return np.bincount(ids[ids >= 0], minlength=num_experts)
