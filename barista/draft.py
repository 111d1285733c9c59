"""A placement while it is being planned: the arrays that the planner's steps read and change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from barista.placement import ExpertKey, Placement, WorkerCapacity

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[Any]


class Draft:
    """K experts in order of (layer, expert), L layers, W workers in the order given.

    held, old: [K, W], who holds what now and who held it when planning began. count: [K], replicas. weight: [K], load,
    1 for each expert of a layer that has none. load: [L, W], an expert's load shared equally by its replicas.
    free: [W], bytes; below zero on a worker that was given more than its capacity. node, domain: [W], as numbers.
    loads: replicas to load beyond those that coverage needs. anchored: [K], whether coverage needs none.
    """

    def __init__(
        self,
        load: Mapping[ExpertKey, float],
        placement: Placement,
        workers: Sequence[WorkerCapacity],
        expert_bytes: Mapping[int, int],
    ) -> None:
        self.keys = sorted(placement.replicas)
        self.workers = [worker.name for worker in workers]
        layers = sorted({layer for layer, _ in self.keys})
        index = {layer: number for number, layer in enumerate(layers)}
        self.layer = np.array([index[layer] for layer, _ in self.keys], np.int64)
        bounds = np.searchsorted(self.layer, np.arange(len(layers) + 1))
        self.rows = [slice(int(start), int(end)) for start, end in pairwise(bounds)]
        self.bytes = np.array([expert_bytes[layer] for layer, _ in self.keys], np.int64)
        self.weight = np.array([float(load.get(key, 0.0)) for key in self.keys], np.float64)
        for rows in self.rows:
            if not self.weight[rows].any():
                self.weight[rows] = 1.0
        nodes = {node: number for number, node in enumerate(dict.fromkeys(worker.node for worker in workers))}
        self.node = np.array([nodes[worker.node] for worker in workers], np.int64)
        self.num_nodes = len(nodes)
        domains = {domain: number for number, domain in enumerate(dict.fromkeys(worker.domain for worker in workers))}
        self.domain = np.array([domains[worker.domain] for worker in workers], np.int64)
        self.num_domains = len(domains)
        self.capacity = np.array([worker.capacity_bytes for worker in workers], np.int64)
        self.held = np.zeros((len(self.keys), len(workers)), np.bool_)
        self._take(placement)
        self.old = self.held.copy()
        self.count = self.held.sum(1)
        self.free = self.capacity - self.bytes @ self.held
        share = self.held * (self.weight / np.maximum(self.count, 1))[:, None]
        self.load = np.array([share[rows].sum(0) for rows in self.rows]).reshape(len(layers), len(workers))
        self.loads = 0
        self.anchored = self.count > 0

    def _take(self, placement: Placement) -> None:
        column = {name: number for number, name in enumerate(self.workers)}
        for row, key in enumerate(self.keys):
            for name in placement.replicas[key]:
                if name in column:
                    self.held[row, column[name]] = True

    def place(self, expert: int, worker: int) -> None:
        """Give a worker a replica that it does not hold."""
        self._change(expert, worker, True)

    def drop(self, expert: int, worker: int) -> None:
        """Take a replica from the worker that holds it."""
        self._change(expert, worker, False)

    def _change(self, expert: int, worker: int, holds: bool) -> None:
        row, held, weight = self.load[self.layer[expert]], self.held[expert], self.weight[expert]
        if self.count[expert]:
            row[held] -= weight / self.count[expert]
        step = 1 if holds else -1
        held[worker] = holds
        self.count[expert] += step
        self.free[worker] -= step * self.bytes[expert]
        if self.count[expert]:
            row[held] += weight / self.count[expert]
        if not self.old[expert, worker]:
            self.loads += step
        # The first replica of an expert that had none is for coverage, which no budget limits.
        if not self.anchored[expert] and self.count[expert] == max(step, 0):
            self.loads -= step

    def nodes_of(self, rows: slice | int) -> Ints:
        """[rows, nodes] or [nodes]: replicas of each expert on each node."""
        one_hot = self.node[:, None] == np.arange(self.num_nodes)
        return np.asarray(self.held[rows].astype(np.int64) @ one_hot)

    def imbalance(self) -> float:
        """Busiest over average worker, summed over the layers: a layer's time is its slowest worker's."""
        total = float(self.load.sum())
        return float(self.load.max(1).sum()) * len(self.workers) / total if total > 0 else 1.0
