"""A router's engine in this process, kept busy, with its experts on worker processes that come to harm meanwhile."""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from experts.attach import WorkerClient
from experts.checkpoint import open_checkpoint
from experts.expert_model import ExpertModel
from experts.link import Link
from experts.remote import PoolConfig, RemotePool
from experts.roster import Member
from router.engine.core import Engine
from router.messages import Submit
from router.model.load import Model, load_model
from tests.distributed.faulty_worker import FAULTS_VARIABLE, set_fault
from tests.distributed.static_pool import FakeController, Placement, StaticPool
from tests.distributed.workers import TRUST, RunningWorker, start_workers
from tests.engines import Recorder, answer, engine_on, request

FAULTY = "tests.distributed.faulty_worker"
MAX_NUM_SEQS = 8
PATIENCE = 30.0  # seconds that anything in a test may take


def nth_request(number: int) -> Submit:
    """A function of its number. Some share their beginnings."""
    rng = random.Random(number)
    head = [list(range(10, 40)), [7] * 30][number % 2][: rng.randrange(16)]
    prompt = head + [rng.randrange(256) for _ in range(rng.randrange(1, 12))]
    sampling = rng.choice([{"temperature": 0.0}, {"temperature": 1.3}, {"temperature": 0.8, "top_p": 0.7}])
    max_tokens = rng.randrange(20, 90)
    return request(str(number), prompt, max_tokens=max_tokens, seed=number, logprobs=0, **sampling)


class Reference:
    """What an engine with local experts answers."""

    def __init__(self, path: Path) -> None:
        self.model = load_model(open_checkpoint(path), torch.float32)
        self._known = Recorder()

    def answers(self, submits: Sequence[Submit]) -> Recorder:
        """Answers of these requests, among others."""
        new = [submit for submit in submits if submit.request_id not in self._known.finished]
        fresh = answer(engine_on(self.model, blocks=512, block_size=8), new)
        for mine, added in zip(vars(self._known).values(), vars(fresh).values(), strict=True):
            mine.update(added)
        return self._known


class Load:
    """How far the serving is, for a script that runs beside it. streams: requests to keep running, at most 8."""

    def __init__(self, streams: int) -> None:
        self.steps = 0
        self.streams = streams
        self._ended = False
        self._changed = threading.Condition()

    def step(self) -> None:
        with self._changed:
            self.steps += 1
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_steps(self, count: int) -> None:
        """Return after so many more steps."""
        goal = self.steps + count
        self.wait_until(lambda: self.steps >= goal)

    def wait_until(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Return when it holds after a step."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._ended or condition(), seconds), "it has not come about"
            assert not self._ended, "the engine has failed"


@dataclass
class Served:
    """What was asked and answered. longest_gap: seconds between two steps' ends, at most."""

    submits: list[Submit] = field(default_factory=list)
    recorder: Recorder = field(default_factory=Recorder)
    longest_gap: float = 0.0

    def assert_same_cup(self, reference: Reference) -> None:
        """No request failed, and every answer is the one of local experts, to the byte."""
        expected = reference.answers(self.submits)
        assert self.recorder.failed == {}
        for name in (submit.request_id for submit in self.submits):
            assert self.recorder.tokens[name] == expected.tokens[name]
            assert self.recorder.logprobs[name] == expected.logprobs[name]
            assert self.recorder.finished[name] == expected.finished[name]


def serve(engine: Engine, script: Callable[[Load], None], streams: int = MAX_NUM_SEQS, first: int = 0) -> Served:
    """Keep so many requests running until `script`, in a thread of its own, has ended; then let them finish."""
    served, load = Served(), Load(streams)
    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(script, load)
        try:
            last = time.monotonic()
            while engine.has_work or not running.done():
                while not running.done() and len(served.submits) - len(served.recorder.finished) < load.streams:
                    served.submits.append(nth_request(first + len(served.submits)))
                    engine.submit(served.submits[-1])
                served.recorder.record(engine.step())
                now = time.monotonic()
                served.longest_gap, last = max(served.longest_gap, now - last), now
                load.step()
                assert not served.recorder.failed, served.recorder.failed
        finally:
            load.end()
        running.result()
    return served


def survives(reference: Reference, limit: float, scenario: Callable[[], Served]) -> Served:
    """Every answer is right, each time; the longest gap is within the limit, in one of two runs."""
    for _ in range(2):
        served = scenario()
        served.assert_same_cup(reference)
        if served.longest_gap <= limit:
            break
    print(f"longest gap {served.longest_gap:.3f} s in {len(served.submits)} requests")
    assert served.longest_gap <= limit
    return served


class PoolEngine:
    """An engine whose experts are in a pool."""

    def __init__(self, path: Path, config: PoolConfig) -> None:
        self.model: Model = load_model(open_checkpoint(path), torch.float32, pool=config)
        assert self.model.remote is not None
        self.remote: RemotePool = self.model.remote
        self.engine = engine_on(self.model, blocks=512, block_size=8, max_num_seqs=MAX_NUM_SEQS)

    def member(self, name: str) -> Member:
        return next(member for member in self.remote.roster.members if member.name == name)

    def link(self, name: str) -> Link | None:
        return self.member(name).link

    def rows(self, name: str) -> int:
        """Rows that were asked of a worker so far."""
        return self.member(name).rows

    @property
    def attached(self) -> bool:
        """Every worker that the controller names is there."""
        members = self.remote.roster.members
        return bool(members) and all(member.up for member in members)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Between two servings."""
        limit = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < limit, "it has not come about"
            self.remote.roster.wait_changed(0.01)


@contextmanager
def engine_on_pool(
    pool: StaticPool, transport: str, *, all_attached: bool = True, **config: object
) -> Iterator[PoolEngine]:
    """An engine with every worker attached."""
    settings = replace(pool.config(transport=transport), **config)  # type: ignore[arg-type]
    engine = PoolEngine(pool.model.path, settings)
    try:
        if all_attached:
            engine.wait(lambda: engine.attached)
        yield engine
    finally:
        engine.remote.close()


class HurtPool(StaticPool):
    """A static pool of workers that can be told to misbehave, and that are replaced when they are dead.

    fronts: addresses that the controller gives instead of the workers' own, by name.
    """

    def __init__(self, model: ExpertModel, faults: Path, stack: ExitStack, names: Sequence[str], spares: int) -> None:
        super().__init__(model, FakeController(), {})
        stack.callback(self.controller.stop)
        self.fronts: dict[str, str] = {}
        self._faults = faults
        self._stack = stack
        started = self._start(*names, *(f"spare-{i}" for i in range(spares)))
        self.workers.update(zip(names, started, strict=False))
        self._spares = started[len(names) :]

    def _start(self, *names: str) -> list[RunningWorker]:
        env = {FAULTS_VARIABLE: str(self._faults)}
        return self._stack.enter_context(start_workers(self.model, *names, env=env, main=FAULTY))

    def publish(self, placement: Placement) -> None:
        told = copy.copy(self)
        told.workers = {
            name: replace(worker, address=self.fronts.get(name, worker.address))
            for name, worker in self.workers.items()
        }
        super(HurtPool, told).publish(placement)
        self.epoch, self.placement = told.epoch, told.placement

    def ail(self, name: str, fault: str = "") -> None:
        """Let a worker misbehave, as tests.distributed.faulty_worker says."""
        set_fault(self._faults, self.workers[name].pid, fault)

    def replace_dead(self) -> None:
        """As a cluster does: another process under the same name, which holds nothing."""
        for name, worker in self.workers.items():
            if worker.process.poll() is not None:
                worker.process.communicate()  # closes its pipes
                self.workers[name] = self._spares.pop() if self._spares else self._start(name)[0]

    def reset(self, placement: Placement) -> None:
        """All are well, and hold this and no more."""
        self.replace_dead()
        for name, worker in self.workers.items():
            self.ail(name)
            client, wanted = WorkerClient(worker.address, TRUST), placement.get(name, {})
            held = [(item.layer, item.expert) for item in client.describe().held]
            client.release([key for key in held if key[1] not in wanted.get(key[0], ())], term=1, epoch=self.epoch)
        self.assign(placement)


@contextmanager
def hurt_pool(model: ExpertModel, folder: Path, *names: str, spares: int = 0) -> Iterator[HurtPool]:
    """spares: processes that wait to stand in for dead ones, because most of a start is importing torch."""
    with ExitStack() as stack:
        yield HurtPool(model, folder, stack, names, spares)


def replicated(model: ExpertModel, *names: str, shift: int = 1) -> dict[str, dict[int, list[int]]]:
    """Each expert on two workers."""
    count = len(names)
    return {
        name: {
            layer: [e for e in range(spec.num_experts) if i in (e % count, (e + shift) % count)]
            for layer, spec in model.layers.items()
        }
        for i, name in enumerate(names)
    }
