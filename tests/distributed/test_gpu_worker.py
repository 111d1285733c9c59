"""A worker process tells how its GPU is: with the recorded answers of a driver, on a machine without one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from experts.checkpoint import open_checkpoint
from experts.controller.calls import WorkerCalls
from experts.controller.member import Description
from experts.controller.runner import Location, Runner
from experts.controller.state import Pool, PoolSettings
from experts.controller.wire import probe_row
from experts.expert_model import ExpertModel, expert_bytes
from experts.health.verdict import HEALTHY, Condition
from tests.distributed.gpu_worker import EVENTS_VARIABLE
from tests.distributed.workers import TRUST, RunningWorker, start_workers, tiny_expert_model

TIMEOUT = 30.0


@dataclass(frozen=True)
class Watched:
    """A worker with a GPU, and the script of what happens to that."""

    process: RunningWorker
    script: Path

    def happens(self, line: str) -> None:
        with self.script.open("a") as file:
            file.write(f"{line}\n")

    def until(self, condition: Callable[[Description], bool]) -> Description:
        """What the worker says of itself, once that is so."""
        return asyncio.run(self._until(condition))

    async def _until(self, condition: Callable[[Description], bool]) -> Description:
        async with asyncio.timeout(TIMEOUT), TRUST.aio_channel(self.process.address) as channel:
            calls = WorkerCalls(channel, self.process.address, TRUST, TIMEOUT)
            while not condition(description := await calls.describe()):
                await asyncio.sleep(0.1)
            return description


@contextmanager
def gpu_worker(model: ExpertModel, name: str, script: Path) -> Iterator[Watched]:
    script.touch()
    main, env = "tests.distributed.gpu_worker", {EVENTS_VARIABLE: str(script)}
    with start_workers(model, name, main=main, env=env, flags=["--gpu", "0"]) as (running,):
        yield Watched(running, script)


def test_a_worker_tells_what_becomes_of_its_gpu(tmp_path: Path) -> None:
    with gpu_worker(tiny_expert_model(tmp_path / "model"), "worker-0", tmp_path / "script") as worker:
        first = worker.until(lambda description: True)
        assert first.verdict == HEALTHY
        assert [gpu.name for gpu in first.gpus] == ["NVIDIA H100 80GB HBM3"]
        worker.happens("clocks 64")
        slow = worker.until(lambda description: description.verdict.condition is Condition.THERMAL)
        assert slow.verdict.weight == 0.5
        worker.happens("xid 31")
        worker.happens("lose")
        lost = worker.until(lambda description: description.verdict.condition is Condition.FATAL)
        assert "GPU is lost" in lost.verdict.reason
        assert dict(lost.gpus[0].xids) == {31: 1}


class ProcessWorkers:
    """experts.controller.runner.Workers: processes of this machine, of which one that moves finds a healthy GPU."""

    def __init__(self, model: ExpertModel, folder: Path, stack: ExitStack) -> None:
        self._model, self._folder, self._stack = model, folder, stack
        self.running: dict[str, Watched] = {}
        self.moved: list[str] = []

    async def start(self, names: list[str]) -> None:
        await asyncio.gather(*map(self._begin, names))

    async def locate(self, name: str, capacity_bytes: int) -> Location:
        return Location(self.running[name].process.address, "node")

    async def restart(self, name: str) -> None:
        raise AssertionError("nobody hangs")

    async def move(self, name: str) -> None:
        self.moved.append(name)
        self.running[name].process.kill()
        await self._begin(name)

    async def stop(self, name: str) -> None:
        raise AssertionError("nobody leaves")

    async def _begin(self, name: str) -> None:
        script = self._folder / f"{name}-{len(self.moved)}"
        made = gpu_worker(self._model, name, script)
        self.running[name] = await asyncio.to_thread(self._stack.enter_context, made)


def test_what_a_failing_gpu_held_is_moved_before_its_worker_is(tmp_path: Path) -> None:
    asyncio.run(_failing_gpu(tmp_path))


async def _failing_gpu(folder: Path) -> None:
    model = tiny_expert_model(folder / "model")
    settings = PoolSettings(
        name=None,
        model_digest=model.digest,
        layers={layer: spec.num_experts for layer, spec in model.layers.items()},
        expert_bytes=expert_bytes(open_checkpoint(model.path), model),
        redundancy=1,
    )
    pool, uncovered = Pool(settings), []
    with ExitStack() as stack:
        workers = ProcessWorkers(model, folder, stack)
        runner = Runner(pool, workers, TRUST, probe_row(model.hidden_size, model.dtype))
        await workers.start(pool.add(2, runner.clock()))
        running = asyncio.create_task(runner.run())
        try:
            async with asyncio.timeout(2 * TIMEOUT):
                while not pool.settled:
                    await runner.changed(pool.revision, seconds=0.1)
                workers.running["worker-0"].happens("xid 79")
                while not pool.members["worker-0"].restarts:
                    uncovered += pool.placement.uncovered()
                    await runner.changed(pool.revision, seconds=0.1)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    assert workers.moved == ["worker-0"]
    assert uncovered == []
    assert not pool.members["worker-0"].draining
