"""Workers in this process, with faults, for tests of what a router does about them. Time is a value."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from experts import kernels
from experts.link import LinkCounters, LinkDown, RowsReply, RowsRequest, RowsStatus
from experts.pool_view import PoolView, WorkerView
from experts.roster import Roster

HIDDEN, INTERMEDIATE, NUM_EXPERTS = 32, 16, 6
Weights = dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class Clock:
    """Seconds that pass when someone waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def random_weights(seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    return {
        e: (matrix(INTERMEDIATE, HIDDEN), matrix(INTERMEDIATE, HIDDEN), matrix(HIDDEN, INTERMEDIATE))
        for e in range(NUM_EXPERTS)
    }


class FakeLink:
    """A link whose worker is in this process.

    faults: what happens to the next requests, one each, then none: "late" (the answer waits for `let_go`), "down",
    "down_on_send", "nan", "failed", "not_held". delay: seconds an answer takes. One window: rows are overwritten.
    """

    transport = "fake"

    def __init__(self, clock: Clock, weights: Weights, held: Sequence[int], max_rows: int = 64, depth: int = 1) -> None:
        self.max_rows, self.depth = max_rows, depth
        self.counters = LinkCounters()
        self.faults: deque[str] = deque()
        self.delay = 0.0001
        self.requests: list[RowsRequest] = []
        self._clock = clock
        self._weights = weights
        self.held = set(held)
        self._window = torch.empty(64 * 8, HIDDEN)
        self._answers: deque[tuple[float, RowsReply]] = deque()
        self._down = False

    @property
    def down(self) -> bool:
        return self._down

    @property
    def outstanding(self) -> int:
        return len(self._answers)

    def send(self, request: RowsRequest) -> None:
        assert not self._answers or self.depth > 1, "a window holds one request"
        assert len(request.tokens) <= self.max_rows
        self.requests.append(request)
        fault = self.faults.popleft() if self.faults else ""
        if self._down or fault == "down_on_send":
            self._down = True
            raise LinkDown("gone")
        if fault == "down":
            self._answers.append((float("inf"), self._reply(request, RowsStatus.OK)))
            self._down = True
            return
        when = float("inf") if fault == "late" else self._clock.now + self.delay
        self._answers.append((when, self._answer(request, fault)))

    def receive(self, deadline: float) -> RowsReply | None:
        if not self._answers:
            raise RuntimeError("nothing was sent that could be answered")
        if self._down:
            raise LinkDown("gone")
        if self._answers and self._answers[0][0] <= max(deadline, self._clock.now):
            when, reply = self._answers.popleft()
            self._clock.now = max(self._clock.now, when)
            return reply
        self._clock.now = max(self._clock.now, deadline)
        return None

    def let_go(self) -> None:
        """Every answer is there now."""
        self._answers = deque((0.0, reply) for _, reply in self._answers)

    def close(self) -> None:
        self._down = True

    def _reply(self, request: RowsRequest, status: RowsStatus, **values: object) -> RowsReply:
        return RowsReply(request.step, request.layer, request.attempt, status, epoch=request.epoch, **values)  # type: ignore[arg-type]

    def _answer(self, request: RowsRequest, fault: str) -> RowsReply:
        asked = {int(e) for e in np.unique(request.topk_ids) if e >= 0}
        if fault == "failed":
            return self._reply(request, RowsStatus.FAILED)
        if fault == "not_held" or not asked <= self.held:
            missing = tuple(sorted(asked - self.held)) or tuple(sorted(asked))
            self.held -= set(missing)
            return self._reply(request, RowsStatus.NOT_HELD, not_held=missing)
        table = kernels.ExpertTable({e: self._weights[e] for e in asked}, NUM_EXPERTS)
        rows = request.hidden_states[torch.from_numpy(request.tokens).long()]
        result = kernels.expert_rows(rows, torch.from_numpy(request.topk_ids.copy()), table)
        assert len(result) == request.num_pairs
        if fault == "nan":
            result = result.clone()
            result[-1, 0] = float("nan")
        if self.depth == 1:
            self._window.fill_(float("nan"))  # what was here before is gone
            self._window[: len(result)] = result
            result = self._window
        return self._reply(request, RowsStatus.OK, address=result.data_ptr(), owner=result)


def view(placement: Mapping[int, Sequence[Sequence[str]]], workers: Sequence[str], epoch: int = 1) -> PoolView:
    """placement: layer -> for each expert its workers."""
    return PoolView(
        term=1,
        epoch=epoch,
        workers=tuple(WorkerView(name, f"{name}:1", "first") for name in workers),
        names=frozenset(workers),
        replicas={layer: tuple(tuple(names) for names in experts) for layer, experts in placement.items()},
        settling=False,
        coverage=1.0,
        problem="",
        model_digest=b"",
    )


def attached_roster(links: Mapping[str, FakeLink], pool_view: PoolView, clock: Callable[[], float]) -> Roster:
    """A roster that has attached every worker of the view."""
    roster = Roster(lambda worker: links[worker.name], dict.fromkeys(pool_view.replicas, NUM_EXPERTS), clock)
    roster.update(pool_view)
    limit = time.monotonic() + 10
    while not all(member.link is not None and not member.attaching for member in roster.members):
        assert time.monotonic() < limit
        roster.wait_changed(0.01)
    return roster
