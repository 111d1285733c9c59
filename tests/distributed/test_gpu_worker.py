"""A worker process tells how its GPU is: with the recorded answers of a driver, on a machine without one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from experts.controller.calls import WorkerCalls
from experts.controller.member import Description
from experts.health.verdict import HEALTHY, Condition
from tests.distributed.gpu_worker import EVENTS_VARIABLE
from tests.distributed.workers import TRUST, start_workers, tiny_expert_model

TIMEOUT = 30.0


@dataclass(frozen=True)
class Watched:
    """A worker with a GPU, and the script of what happens to that."""

    address: str
    script: Path

    def happens(self, line: str) -> None:
        with self.script.open("a") as file:
            file.write(f"{line}\n")

    def until(self, condition: Callable[[Description], bool]) -> Description:
        """What the worker says of itself, once that is so."""
        return asyncio.run(self._until(condition))

    async def _until(self, condition: Callable[[Description], bool]) -> Description:
        async with asyncio.timeout(TIMEOUT), TRUST.aio_channel(self.address) as channel:
            calls = WorkerCalls(channel, self.address, TRUST, TIMEOUT)
            while not condition(description := await calls.describe()):
                await asyncio.sleep(0.1)
            return description


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Watched]:
    script = tmp_path / "script"
    script.touch()
    model = tiny_expert_model(tmp_path / "model")
    options = {"main": "tests.distributed.gpu_worker", "env": {EVENTS_VARIABLE: str(script)}, "flags": ["--gpu", "0"]}
    with start_workers(model, "worker-0", **options) as (running,):  # type: ignore[arg-type]
        yield Watched(running.address, script)


def test_a_worker_tells_what_becomes_of_its_gpu(worker: Watched) -> None:
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
