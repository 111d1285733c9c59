"""Ranks as processes on a GPU, by CUDA IPC; where there is one GPU they take turns on it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("msgspec")
pytest.importorskip("grpc")
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
pytest.importorskip("transformers")

from experts.expert_parallel.gpus import choose_gpus, visible_uuids
from experts.expert_parallel.group_pool import GroupPool
from experts.expert_parallel.machine import check_peers, cuda_library
from experts.expert_parallel.pool import GroupConfig
from router.model.load import Model
from tests import tiny
from tests.device_models import device_model, run_again
from tests.engines import answer, engine_on, request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is in reach"),
]

GPU = torch.device("cuda", 0)
SUBMITS = [
    *(request(f"greedy {i}", [10 + i, 4, 5, 6], max_tokens=8, temperature=0) for i in range(4)),
    request("long", range(3, 33), max_tokens=4, temperature=0),
]
BUDGET = 16


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("deepseek_v3")
    tiny.make("deepseek_v3", directory)
    return directory


@contextmanager
def on_group(directory: Path, dtype: torch.dtype, workers: int) -> Iterator[tuple[Model, GroupPool]]:
    devices = tuple(torch.device("cuda", gpu) for gpu in choose_gpus(visible_uuids(), workers).workers)
    model = device_model(directory, dtype, GPU, group=GroupConfig(engine=GPU, workers=devices, max_tokens=BUDGET))
    assert isinstance(model.pool, GroupPool)
    try:
        yield model, model.pool
    finally:
        model.pool.close()


def test_the_answers_in_float32_are_those_of_one_device(directory: Path) -> None:
    alone = device_model(directory, torch.float32, GPU, capture=run_again)  # padded to the same sizes
    wanted = answer(engine_on(alone, budget=BUDGET), SUBMITS)
    with on_group(directory, torch.float32, 2) as (model, _):
        ours = answer(engine_on(model, budget=BUDGET), SUBMITS)
    assert ours.tokens == wanted.tokens
    assert not ours.failed


def test_graphs_of_engine_and_workers_pace_one_another(directory: Path) -> None:
    with on_group(directory, torch.bfloat16, 2) as (model, _):
        first = answer(engine_on(model, budget=BUDGET), SUBMITS)
        again = answer(engine_on(model, budget=BUDGET), SUBMITS)
    assert again.tokens == first.tokens
    assert not again.failed


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_worker_costs_no_token(directory: Path, how: signal.Signals) -> None:
    with on_group(directory, torch.float32, 2) as (model, pool):
        wanted = answer(engine_on(model, budget=BUDGET), SUBMITS)
        engine = engine_on(model, budget=BUDGET)
        for submit in SUBMITS:
            engine.submit(submit)
        tokens: dict[str, list[int]] = {}
        step = 0
        while engine.has_work:
            if step == 3:
                os.kill(pool.worker_pids[-1], how)
            for token in engine.step().tokens:
                tokens.setdefault(token.request_id, []).append(token.token_id)
            step += 1
        assert len(pool.worker_pids) == 1
    assert tokens == wanted.tokens


def test_every_gpu_reaches_every_other_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU has no peers")
    check_peers(cuda_library(), range(torch.cuda.device_count()))
