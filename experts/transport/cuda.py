"""Rows between GPUs, by the kernels of cuda/ (docs/gpu.md): the engine's and the worker's end of a group of ranks.

The engine is rank 0 and has all the tokens; each worker is one rank more and has some of the experts. Both ends do the
same calls in the same order, so that flags in their windows pace them and no CPU stands between two layers. With the
CPU twin of the kernels the same code runs on ordinary memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.expert_parallel.rank import Ranks
from experts.pool import DispatchBatch

ENGINE = 0  # its rank

# (rows [n, hidden], ends [num_local_experts] int32) -> rows [n, hidden]: experts.device.DeviceExperts.
Experts = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Ticket:
    """A layer under way. output: [num_tokens, hidden]; failed: [num_tokens] uint8. Both are filled by combine."""

    output: Tensor
    failed: Tensor


class CudaTransport:
    """The engine's end: an experts.pool.Transport that launches and never waits, so that a step may be a CUDA graph.

    What went wrong is told once a step by the rank's status (experts/expert_parallel/pool.py), and by failed rows.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._engine = ranks.ranks[0]

    def dispatch(self, batch: DispatchBatch) -> Ticket:
        """See Transport. Raises ConfigError for more tokens than the windows have room for."""
        output, failed = self._engine.feed(
            batch.hidden_states.contiguous(), batch.topk_ids.contiguous(), batch.topk_weights.contiguous()
        )
        self._ranks.send(_stream(self._engine.device))
        return Ticket(output, failed)

    def combine(self, ticket: Ticket) -> tuple[Tensor, Tensor]:
        """See Transport."""
        self._ranks.receive(_stream(self._engine.device))
        return ticket.output, ticket.failed.bool()


class WorkerStep:
    """The worker's end: one step is every MoE layer in its order, with no token of its own.

    experts: of each layer. may_capture: whether the layers never ask the host, so that a step becomes a CUDA graph, one
    for each number of rows. The first step of a number runs kernel by kernel, which sets up what a graph may not.
    """

    def __init__(self, ranks: Ranks, experts: Mapping[int, Experts], *, may_capture: bool = False) -> None:
        self._ranks, self._rank = ranks, ranks.ranks[0]
        self._layers = [experts[layer] for layer in sorted(experts)]
        shape, device = self._rank.shape, self._rank.device
        self._rank.feed(
            torch.empty(0, shape.hidden_size, dtype=shape.dtype, device=device),
            torch.empty(0, shape.top_k, dtype=torch.int32, device=device),
            torch.empty(0, shape.top_k, device=device),
        )
        ranks.route(_stream(device))  # once and for all: no token, and so no row for anybody
        self._may_capture = may_capture
        self._has_run: set[int] = set()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._memory = torch.cuda.graph_pool_handle() if may_capture else None  # one graph alone runs at a time

    def run(self, num_tokens: int) -> None:
        """One step, in which the engine sends at most num_tokens tokens in a layer."""
        rows = self._rows_of(num_tokens)
        if not self._may_capture or rows not in self._has_run:
            self._run(rows)
            self._has_run.add(rows)
            return
        if rows not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            # thread_local: another thread may abort the group meanwhile.
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                self._run(rows)
            self._graphs[rows] = graph
        self._graphs[rows].replay()

    def _rows_of(self, num_tokens: int) -> int:
        """How many expert rows so many tokens can make here: what the experts are given, since shapes are static."""
        shape, held = self._rank.shape, self._rank.num_local_experts
        padding = held * (shape.alignment - 1)
        return min(shape.rows, num_tokens * min(shape.top_k, held) + padding)

    def _run(self, rows: int) -> None:
        stream, rank = _stream(self._rank.device), self._rank
        for experts in self._layers:
            self._ranks.sync_dispatch(stream)
            self._ranks.expand(stream)
            rank.results(experts(rank.expert_rows[:rows], rank.expert_ends[: rank.num_local_experts]))
            self._ranks.receive(stream)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
