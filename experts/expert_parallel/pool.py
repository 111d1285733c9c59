"""One engine and its workers as a group of ranks: started, stepped, and made again from the survivors when one is lost.

A step is all or nothing. The engine's kernels give a rank up that does not come (cuda/ep.h); a dead process is noticed
sooner, and the engine's waits are aborted. `settle` then finds the step bad: the group is made anew of the survivors,
which read what the lost have had from the checkpoint, and the engine computes the step once more. Nothing of a bad
step is ever seen, because a step writes only keys and values, which the next try writes again.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from barista.errors import BaristaError, ConfigError
from experts.expert_model import ExpertModel
from experts.expert_parallel.library import KernelError
from experts.expert_parallel.machine import check_peers, library_for, memory_for, using
from experts.expert_parallel.memory import Block
from experts.expert_parallel.processes import WorkerLost, WorkerProcess, WorkerRefused
from experts.expert_parallel.rank import TIMEOUT_SECONDS, Rank, Ranks
from experts.expert_parallel.shape import ExpertMap, GroupShape, shape_to_json
from experts.expert_parallel.structs import BAD_ID, OVERFLOW
from experts.pool import DispatchBatch
from experts.transport.cuda import ENGINE, CudaTransport, Ticket

log = logging.getLogger(__name__)

START_SECONDS = 120.0
LOAD_SECONDS = 3600.0  # of experts from a cold disk
LEAST_LEAVE_SECONDS = 3.0
MAX_IN_VAIN = 2


class NoWorkers(BaristaError):
    """No worker is left that could hold the experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupConfig:
    """engine: the device of the trunk; workers: that of each worker. max_tokens: of one step.

    timeout: seconds that a layer waits for a rank. threads: of each worker's host side. unfit: CUDA indices of GPUs
    that must not be used any more.
    """

    engine: torch.device
    workers: tuple[torch.device, ...]
    max_tokens: int
    timeout: float = TIMEOUT_SECONDS
    wire: Literal["values", "fp8"] = "values"
    combine: Literal["exact", "partial"] = "exact"
    threads: int = 1
    unfit: Callable[[], Collection[int]] = frozenset


def padded_tokens(num_tokens: int) -> int:
    """What the workers prepare for: 8, 16, 32, ... so that they have few graphs, each of at most twice the rows."""
    return max(8, 1 << (num_tokens - 1).bit_length())


class ParallelPool:
    """An experts.pool.Transport over child processes. Used by one thread; `close` it.

    generation: counts the groups. What was captured in a CUDA graph belongs to one of them.
    """

    def __init__(self, model: ExpertModel, config: GroupConfig) -> None:
        if not config.workers:
            raise ConfigError("A group on GPUs has no workers.", "Give --workers N.")
        self._model, self._config = model, config
        self._num_experts = max(spec.num_experts for spec in model.layers.values())
        if any(spec.num_experts != self._num_experts for spec in model.layers.values()):
            raise ConfigError("The model's layers have different numbers of experts.", "Use --workers on the CPU.")
        if len(config.workers) > self._num_experts:
            raise ConfigError(
                f"{len(config.workers)} workers for {self._num_experts} experts of a layer.",
                f"Give --workers {self._num_experts} or fewer.",
            )
        self._library = library_for(config.engine)
        if config.engine.type == "cuda":
            check_peers(self._library, config.engine.index or 0, [device.index or 0 for device in config.workers])
        self._memory = memory_for(config.engine, self._library)
        self._workers: list[tuple[WorkerProcess, torch.device]] = []
        self._rank: Rank | None = None
        self._windows: list[Block] = []
        self._transport: CudaTransport | None = None
        self._shares: dict[WorkerProcess, tuple[int, ...]] = {}
        self._in_vain = 0  # steps in a row that were lost though nobody was
        self._has_served = False
        self.workers_lost = 0
        self._windows_lock = threading.Lock()  # they are aborted from the threads that watch the workers
        self.generation = 0
        self.capturable = config.engine.type == "cuda"

    def start(self) -> None:
        """Start the workers and load the experts. Raises ConfigError, WorkerRefused for one that cannot hold its share,
        and NoWorkers."""
        self._workers = [
            (WorkerProcess(f"worker-{i}", self._model, self._config.threads, self._abort), device)
            for i, device in enumerate(self._config.workers)
        ]
        _, lost = self._answers("start", START_SECONDS)
        if lost:
            raise NoWorkers(f"The workers do not start: {'; '.join(lost)}.", "Their lines above say why.")
        self._make_group()

    def begin_step(self, num_tokens: int) -> None:
        """Have every worker run one step, whose layers have at most num_tokens tokens. Before the first layer."""
        tokens = min(padded_tokens(num_tokens), self._config.max_tokens)
        for worker, _ in self._workers:
            self._tell(worker, {"do": "step", "tokens": tokens})

    def prepare(self) -> None:
        """Between two steps: leave the workers that have gone, and those whose GPUs have become unfit.

        Raises NoWorkers if no others are left.
        """
        unfit = self._config.unfit()
        left = [worker for worker, device in self._workers if device.index in unfit or not worker.alive]
        for worker in left:
            log.warning("%s is left: %s.", worker.name, "its GPU is unfit" if worker.alive else "it has gone")
            self._drop(worker)
        if left or self._transport is None:
            self._make_group()

    def dispatch(self, batch: DispatchBatch) -> Ticket:
        """See experts.pool.Transport."""
        assert self._transport is not None
        return self._transport.dispatch(batch)

    def combine(self, ticket: Ticket) -> tuple[Tensor, Tensor]:
        """See experts.pool.Transport."""
        assert self._transport is not None
        return self._transport.combine(ticket)

    def settle(self) -> bool:
        """After a step, once it has been waited for: whether it counts. If not, there is a new group to run it again.

        Raises NoWorkers when none is left, or those that are left do not come time after time; RuntimeError for a top-k
        id that is no expert, which is a mistake of ours.
        """
        assert self._rank is not None
        status = int(self._rank.status)
        if not status:
            self._in_vain = 0
            return True
        if status & (BAD_ID | OVERFLOW):
            raise RuntimeError(f"the kernels refused what the engine routed (status {status})")
        log.warning("A rank of the GPU group did not come in a step, which is computed again with a new group.")
        before = len(self._workers)
        self._make_group()
        self._in_vain = 0 if len(self._workers) < before else self._in_vain + 1
        if self._in_vain > MAX_IN_VAIN:
            raise NoWorkers(
                f"Every worker answers, but {self._in_vain} steps in a row were not finished within "
                f"{self._config.timeout:g} s a layer.",
                "Look at the workers' lines above and at their GPUs (nvidia-smi).",
            )
        return False

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Of the workers in the group."""
        return tuple(worker.pid for worker, _ in self._workers)

    def close(self) -> None:
        """End the workers and give the memory back."""
        self._abort()
        for worker, _ in self._workers:
            worker.end()
        self._workers = []
        self._drop_windows()

    def _abort(self) -> None:
        """End the waits of every rank. From any thread; harmless when there are none."""
        with self._windows_lock, using(self._config.engine):
            for window in self._windows:
                self._quietly(functools.partial(self._library.call, "ep_window_abort", window.address))

    def _make_group(self) -> None:
        """A group of all workers that answer, every expert on one of them; repeated while some are lost meanwhile."""
        self._abort()
        while True:
            # In two steps: nobody's memory may be given back while somebody has it open.
            self._tell_all({"do": "leave"})
            self._answers("leave", max(LEAST_LEAVE_SECONDS, self._config.timeout))
            self._drop_windows()
            if not self._workers:
                raise NoWorkers("No worker of the GPU group is left.", "The lines above say how they were lost.")
            if self._try_group():
                return

    def _try_group(self) -> bool:
        shape, experts = self._plan()
        config = self._config
        self._rank = Rank(self._library, self._memory, config.engine, shape, experts, ENGINE, timeout=config.timeout)
        order = {"do": "load", "shape": shape_to_json(shape), "ranks": experts.ranks, "timeout": config.timeout}
        for number, (worker, device) in enumerate(self._workers):
            self._tell(worker, order | {"rank": number + 1, "device": str(device)})
        answers, lost = self._answers("load", LOAD_SECONDS)
        if lost:
            return False
        for number, (worker, _) in enumerate(self._workers):
            self._shares[worker] = experts.local(number + 1)
        self._open_windows(self._rank, [(bytes.fromhex(answer["window"]), answer["size"]) for answer in answers])
        own = self._rank.window
        self._tell_all({"do": "join", "engine": own.handle().hex(), "size": own.size})
        if self._answers("join", START_SECONDS)[1]:
            return False
        self._transport = CudaTransport(Ranks(self._library, [self._rank]))
        self._has_served = True
        log.info("GPU group: %d experts of a layer on %d workers.", self._num_experts, len(self._workers))
        return True

    def _plan(self) -> tuple[GroupShape, ExpertMap]:
        """Every worker keeps what it has, and gets its part of what nobody has."""
        config, num_ranks = self._config, len(self._workers) + 1
        shares = [self._shares.get(worker, ()) for worker, _ in self._workers]
        experts = ExpertMap.redealt(self._num_experts, shares, num_ranks)
        pairs = config.max_tokens * min(self._model.top_k, experts.most())
        shape = GroupShape(
            num_ranks=num_ranks,
            num_experts=self._num_experts,
            max_local_experts=experts.most(),
            top_k=self._model.top_k,
            hidden_size=self._model.hidden_size,
            max_tokens=config.max_tokens,
            max_rows=pairs,
            num_sources=1,  # the engine alone sends
            dtype=getattr(torch, self._model.dtype),
            wire=config.wire,
            combine=config.combine,
        )
        return shape, experts

    def _open_windows(self, rank: Rank, theirs: list[tuple[bytes, int]]) -> None:
        opened = [self._memory.open(handle, size) for handle, size in theirs]
        with self._windows_lock:
            self._windows = [rank.window, *opened]
        rank.join(self._windows)

    def _answers(self, order: str, seconds: float) -> tuple[list[dict[str, Any]], list[str]]:
        """The workers' answers to an order in their order, and what happened to the others, which are dropped.

        Raises WorkerRefused while the first group is made; later on, one that refuses is as good as lost.
        """
        deadline = time.monotonic() + seconds
        answers: list[dict[str, Any]] = []
        lost: list[str] = []
        for worker, _ in list(self._workers):
            try:
                answers.append(worker.answer(order, deadline))
            except (WorkerLost, WorkerRefused) as error:
                if isinstance(error, WorkerRefused) and not self._has_served:
                    raise
                log.warning("%s.", error)
                lost.append(str(error))
                self._drop(worker)
        return answers, lost

    def _tell_all(self, order: dict[str, Any]) -> None:
        for worker, _ in self._workers:
            self._tell(worker, order)

    def _tell(self, worker: WorkerProcess, order: dict[str, Any]) -> None:
        """One that has gone is found out when it does not answer."""
        with contextlib.suppress(WorkerLost):
            worker.tell(order)

    def _drop(self, worker: WorkerProcess) -> None:
        worker.end(now=True)
        self.workers_lost += 1
        self._workers = [(other, device) for other, device in self._workers if other is not worker]

    def _drop_windows(self) -> None:
        """Nothing that was captured with them may run again."""
        self._transport = None
        self.generation += 1
        with self._windows_lock:
            for window in self._windows[1:]:
                self._quietly(window.close)
            self._windows = []
        if self._rank is not None:
            self._quietly(self._rank.close)
            self._rank = None

    def _quietly(self, call: Callable[[], object]) -> None:
        """What fails for one window, such as that of a process that has died, must not keep the others from it."""
        try:
            call()
        except KernelError as error:
            log.warning("%s", error)
