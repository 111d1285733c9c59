"""An engine whose experts are on ranks of a group: the answers of one that holds them, also when a rank is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from experts.checkpoint import open_checkpoint
from experts.cluster.processes import children
from experts.expert_parallel.group_pool import GroupPool
from experts.expert_parallel.pool import GroupConfig, NoWorkers
from router.framing import frame, read_frame
from router.messages import EngineConfig, Loading, Ready, StepEvents, decode_event, encode
from router.model.load import Model, load_model
from tests import tiny
from tests.device_models import CPU, device_model, run_again
from tests.engines import Recorder, answer, engine_on, request

SUBMITS = [
    *(request(f"greedy {i}", [10 + i, 4, 5, 6], max_tokens=10, temperature=0) for i in range(4)),
    request("long", range(3, 33), max_tokens=6, temperature=0),
    request("drawn", [7, 8, 9], max_tokens=10, temperature=0.9, seed=3),
]
BUDGET = 16
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("deepseek_v3")
    tiny.make("deepseek_v3", directory)
    return directory


@contextmanager
def on_group(
    directory: Path,
    workers: tuple[torch.device, ...],
    timeout: float = 30.0,
    unfit: Callable[[], set[int]] = set,
    **changes: object,
) -> Iterator[tuple[Model, GroupPool]]:
    config = GroupConfig(engine=CPU, workers=workers, max_tokens=BUDGET, timeout=timeout, unfit=unfit)
    model = device_model(directory, group=config, **changes)
    assert isinstance(model.pool, GroupPool)
    try:
        yield model, model.pool
    finally:
        model.pool.close()


def stepping(model: Model, before_step: Callable[[int], object]) -> tuple[Recorder, object]:
    """The answers to SUBMITS, and how often each expert was chosen. before_step: told of each step's number."""
    engine, recorder = engine_on(model, budget=BUDGET), Recorder()
    for submit in SUBMITS:
        engine.submit(submit)
    step = 0
    while engine.has_work:
        before_step(step)
        recorder.record(engine.step())
        step += 1
    stats, pool = engine.stats(), model.pool
    assert isinstance(pool, GroupPool)
    assert (stats.group_workers, stats.recomputed_steps) == (len(pool.worker_pids), pool.recomputed_steps)
    return recorder, stats.expert_tokens


@pytest.mark.parametrize("capture", [None, run_again], ids=["by kernel", "captured"])
def test_the_answers_are_those_of_an_engine_with_its_own_experts(directory: Path, capture) -> None:
    wanted = answer(engine_on(load_model(open_checkpoint(directory), torch.float32)), SUBMITS)
    with on_group(directory, (CPU,) * 2, capture=capture) as (model, _):
        ours, _ = stepping(model, lambda step: None)
    assert ours.tokens == wanted.tokens
    assert ours.finished == wanted.finished
    assert not ours.failed


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_worker_costs_no_token_and_no_count(directory: Path, how: signal.Signals) -> None:
    with on_group(directory, (CPU,) * 3, timeout=30.0 if how == signal.SIGKILL else 2.0, capture=run_again) as (
        model,
        pool,
    ):
        wanted, counts = stepping(model, lambda step: None)
        before = torch.tensor(counts)
        lost = []

        def lose(step: int) -> None:
            if step in (3, 8):
                lost.append(pool.worker_pids[-1])
                os.kill(lost[-1], how)

        ours, counts = stepping(model, lose)
        assert len(lost) == 2
        assert not set(lost) & set(pool.worker_pids)
        assert pool.workers_lost == 2
        assert pool.recomputed_steps == 2 or how == signal.SIGKILL  # a death may be seen before the step
    assert ours.tokens == wanted.tokens
    assert ours.finished == wanted.finished
    assert not ours.failed
    assert torch.equal(torch.tensor(counts), 2 * before)


def test_what_was_captured_with_a_lost_worker_is_captured_anew(directory: Path) -> None:
    """On a GPU a replay would write to memory that has been given back."""
    captured = []

    def capture(run: Callable[[], None], before: Callable[[], None]) -> Callable[[], None]:
        group = len(set(captured))
        captured.append(pool.prepare())

        def replay() -> None:
            assert captured[-1] == pool.prepare(), f"captured for group {group}"
            run()

        return replay

    with on_group(directory, (CPU,) * 2, capture=capture) as (model, pool):
        stepping(model, lambda step: os.kill(pool.worker_pids[-1], signal.SIGKILL) if step == 4 else None)
    assert len(set(captured)) == 2


def test_the_engines_process_serves_from_workers_of_its_own_and_takes_them_along(directory: Path) -> None:
    config = EngineConfig(path=str(directory), device="cuda", gpu_workers=2, max_num_batched_tokens=BUDGET,
                          max_num_seqs=8, max_model_len=64)  # fmt: skip
    api, engine = socket.socketpair()
    command = [sys.executable, "-m", "tests.distributed.engine_on_cpus", str(engine.fileno())]
    with api, subprocess.Popen(command, pass_fds=[engine.fileno()], cwd=ROOT) as process:
        engine.close()
        api.sendall(frame(encode(config)))
        while not isinstance(event := decode_event(read_frame(api) or b""), Ready):
            assert isinstance(event, Loading), event
        workers = children(process.pid)
        for submit in SUBMITS:
            api.sendall(frame(encode(submit)))
        tokens: dict[str, list[int]] = {}
        open_requests = {submit.request_id for submit in SUBMITS}
        while open_requests:
            event = decode_event(read_frame(api) or b"")
            assert isinstance(event, StepEvents)
            assert not event.failed
            for token in event.tokens:
                tokens.setdefault(token.request_id, []).append(token.token_id)
                open_requests -= {token.request_id} if token.finish_reason else set()
        api.shutdown(socket.SHUT_RDWR)
        assert process.wait(30) == 0
    assert tokens == answer(engine_on(load_model(open_checkpoint(directory), torch.float32)), SUBMITS).tokens
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_engine_without_workers_ends(directory: Path) -> None:
    with on_group(directory, (CPU,)) as (model, pool), pytest.raises(NoWorkers):
        stepping(model, lambda step: os.kill(pool.worker_pids[0], signal.SIGKILL) if step == 2 else None)


def test_a_worker_whose_gpu_falls_ill_is_left_between_two_steps(directory: Path) -> None:
    unfit: set[int] = set()
    devices = CPU, torch.device("cpu", 0), CPU  # of three workers, one has a device with an index
    with on_group(directory, devices, capture=run_again, unfit=lambda: unfit) as (model, pool):
        wanted, _ = stepping(model, lambda step: None)
        before = pool.worker_pids
        ours, _ = stepping(model, lambda step: unfit.update({0} if step == 4 else ()))
        assert pool.worker_pids == (before[0], before[2])
    assert ours.tokens == wanted.tokens
    assert not ours.failed


def test_workers_read_the_fp8_experts_that_the_engine_has_packed(directory: Path) -> None:
    alone = answer(engine_on(device_model(directory, weight_format="fp8"), budget=BUDGET), SUBMITS)
    with on_group(directory, (CPU,) * 2, weight_format="fp8") as (model, _):
        ours, _ = stepping(model, lambda step: None)
    assert ours.tokens == alone.tokens
