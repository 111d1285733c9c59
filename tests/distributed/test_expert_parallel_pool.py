"""A group of ranks as real processes, on the CPU twin: the same bytes whoever holds the experts and whoever is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from barista.errors import ConfigError
from experts import kernels
from experts.checkpoint import open_checkpoint
from experts.expert_model import ExpertModel
from experts.expert_parallel.pool import GroupConfig, NoWorkers, ParallelPool
from experts.expert_parallel.shape import GroupShape, shape_to_json
from experts.expert_parallel.worker import Worker
from experts.expert_weights import ExpertReader
from experts.kernels.expert_table import ExpertWeights
from experts.pool import ExpertPool
from experts.spec import FFNSpec
from tests.distributed.workers import tiny_expert_model
from tests.unit.expert_parallel import same

CPU = torch.device("cpu")
TOKENS = 9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ExpertModel:
    return tiny_expert_model(tmp_path_factory.mktemp("tiny"))


@contextmanager
def pool_of(model: ExpertModel, workers: int, timeout: float = 30.0) -> Iterator[ParallelPool]:
    pool = ParallelPool(model, GroupConfig(engine=CPU, workers=(CPU,) * workers, max_tokens=TOKENS, timeout=timeout))
    try:
        pool.start()
        yield pool
    finally:
        pool.close()


def inputs(model: ExpertModel, seed: int = 0, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spec = next(iter(model.layers.values()))
    ids = torch.rand(tokens, spec.num_experts, generator=generator).argsort(dim=1)[:, : model.top_k]
    return (
        torch.randn(tokens, model.hidden_size, generator=generator),
        ids.to(torch.int32),
        torch.rand(tokens, model.top_k, generator=generator),
    )


def step(
    pool: ParallelPool, model: ExpertModel, seed: int = 0, after_one_layer: Callable[[], object] = lambda: None
) -> Tensor:
    """All layers, one after the other on the same rows; [num_layers, tokens, hidden]."""
    experts = ExpertPool(pool, max(model.layers) + 1, 4)
    rows, ids, weights = inputs(model, seed)
    outputs = []
    pool.begin_step(len(rows))
    for layer in sorted(model.layers):
        output, _ = experts.begin(0, layer, rows, ids, weights).wait()
        outputs.append(output)
        if len(outputs) == 1:
            after_one_layer()
    return torch.stack(outputs)


def test_the_bytes_do_not_depend_on_the_number_of_workers_and_the_rows_are_the_models(model: ExpertModel) -> None:
    with pool_of(model, 1) as one, pool_of(model, 3) as three:
        for seed in range(3):
            alone, spread = step(one, model, seed), step(three, model, seed)
            assert one.settle()
            assert three.settle()
            assert same(alone, spread)
    reader = ExpertReader(open_checkpoint(model.path), torch.float32)
    for index, (layer, spec) in enumerate(sorted(model.layers.items())):
        weights = {expert: reader.read(spec, layer, expert) for expert in range(spec.num_experts)}
        table = kernels.ExpertTable(weights, spec.num_experts, dtype=torch.float32)
        wanted, failed = kernels.moe(*inputs(model, 2), table)
        assert not failed.any()
        torch.testing.assert_close(alone[index], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_lost_in_a_step_costs_that_step_alone(model: ExpertModel, how: signal.Signals) -> None:
    with pool_of(model, 3, timeout=30.0 if how == signal.SIGKILL else 2.0) as pool:
        wanted = step(pool, model)
        assert pool.settle()
        victim = pool.worker_pids[1]
        step(pool, model, after_one_layer=lambda: os.kill(victim, how))
        assert not pool.settle()
        assert pool.generation == 2
        assert victim not in pool.worker_pids
        assert len(pool.worker_pids) == 2
        for _ in range(2):
            again = step(pool, model)
            assert pool.settle()
            assert same(again, wanted)


def test_a_death_ends_the_wait_for_it_at_once(model: ExpertModel) -> None:
    with pool_of(model, 2, timeout=3600.0) as pool:
        os.kill(pool.worker_pids[0], signal.SIGKILL)
        step(pool, model)  # would wait for an hour
        assert not pool.settle()


def test_without_any_worker_the_engine_is_told(model: ExpertModel) -> None:
    with pool_of(model, 2) as pool:
        for pid in pool.worker_pids:
            os.kill(pid, signal.SIGKILL)
        step(pool, model)
        with pytest.raises(NoWorkers):
            pool.settle()


def test_a_worker_that_has_gone_between_two_steps_costs_none(model: ExpertModel) -> None:
    with pool_of(model, 2, timeout=3600.0) as pool:
        wanted = step(pool, model)
        assert pool.settle()
        os.kill(pool.worker_pids[0], signal.SIGKILL)
        deadline = time.monotonic() + 30
        while len(pool.worker_pids) == 2:
            assert time.monotonic() < deadline
            pool.prepare()
        assert same(step(pool, model), wanted)
        assert pool.settle()


def test_a_worker_that_fails_in_a_step_ends_and_is_left(model: ExpertModel, tmp_path: Path) -> None:
    with pool_of(model, 2, timeout=3600.0) as pool:
        wanted = step(pool, model)
        assert pool.settle()
        victim = pool._workers[1][0]
        victim.tell({"do": "step", "tokens": "many"})  # no number: it raises before it takes part
        step(pool, model)
        assert not pool.settle()
        assert victim.pid not in pool.worker_pids
        assert same(step(pool, model), wanted)
        assert pool.settle()


def test_workers_that_answer_but_never_come_are_not_waited_for_for_ever(model: ExpertModel) -> None:
    with pool_of(model, 1, timeout=0.2) as pool:
        experts = ExpertPool(pool, max(model.layers) + 1, 4)
        for _ in range(2):
            experts.begin(0, 0, *inputs(model)).wait()  # of a step that no worker was told of
            assert not pool.settle()
        experts.begin(0, 0, *inputs(model)).wait()
        with pytest.raises(NoWorkers, match="3 steps in a row"):
            pool.settle()


def test_a_worker_reads_no_expert_twice(model: ExpertModel, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, read = Worker(model), []
    plainly = ExpertReader.read

    def reading(self: ExpertReader, spec: FFNSpec, layer: int, expert: int) -> ExpertWeights:
        read.append((layer, expert))
        return plainly(self, spec, layer, expert)

    monkeypatch.setattr(ExpertReader, "read", reading)
    for owners, new in (([1, 2, 1, 2], {0, 2}), ([1, 2, 1, 1], {3}), ([2, 1, 1, 1], {1})):
        read.clear()
        shape = GroupShape(num_ranks=3, num_experts=4, max_local_experts=3, top_k=2, hidden_size=model.hidden_size,
                           max_tokens=4, dtype=torch.float32)  # fmt: skip
        order = {"do": "load", "shape": shape_to_json(shape), "ranks": owners, "timeout": 1.0}
        worker.obey({"do": "leave"})
        worker.obey(order | {"rank": 1, "device": "cpu"})
        assert sorted(read) == sorted((layer, expert) for layer in model.layers for expert in new)


def test_after_the_last_worker_every_step_says_so(model: ExpertModel) -> None:
    with pool_of(model, 1) as pool:
        os.kill(pool.worker_pids[0], signal.SIGKILL)
        step(pool, model)
        with pytest.raises(NoWorkers):
            pool.settle()
        with pytest.raises(NoWorkers):
            pool.prepare()


def test_more_workers_than_experts_are_refused_before_any_starts(model: ExpertModel) -> None:
    with pytest.raises(ConfigError, match="5 workers for 4 experts") as refused:
        ParallelPool(model, GroupConfig(engine=CPU, workers=(CPU,) * 5, max_tokens=TOKENS))
    assert "--workers 4" in refused.value.remedy


def test_more_tokens_than_the_windows_have_room_for_are_refused_and_nothing_else_is_disturbed(
    model: ExpertModel,
) -> None:
    with pool_of(model, 1) as pool:
        wanted = step(pool, model)
        assert pool.settle()
        experts = ExpertPool(pool, max(model.layers) + 1, 4)
        with pytest.raises(ConfigError, match="10 tokens"):
            experts.begin(0, 0, *inputs(model, tokens=10))
        assert same(step(pool, model), wanted)
        assert pool.settle()


ENGINE = """
import sys, time
from pathlib import Path
from experts.expert_model import ExpertModel
from tests.distributed.test_expert_parallel_pool import pool_of
model = ExpertModel.from_json(Path(sys.argv[1]).read_text())
with pool_of(model, 2, timeout=3600.0) as pool:
    pool.begin_step(1)  # the workers wait for rows that never come
    print(*pool.worker_pids, flush=True)
    time.sleep(3600)
"""


def test_workers_do_not_outlive_their_engine(model: ExpertModel, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(model.to_json())
    command = [sys.executable, "-c", ENGINE, str(tmp_path / "model.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as engine:
        assert engine.stdout is not None
        pids = [int(pid) for pid in engine.stdout.readline().split()]
        engine.kill()
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(pids) == 2


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
