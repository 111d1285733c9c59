"""The keeper's life beside the server's: what it is told, what it tells, and each way in which one of them goes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_model import write_tiny_model

from barista.config import ServeConfig
from barista.errors import BaristaError, CheckpointError, ConfigError
from experts.cluster.messages import PoolConfig
from experts.expert_model import ExpertModel
from experts.spec import FFNSpec
from router import pool_process
from router.pool_order import RAY_ADDRESS, pool_order, worker_threads
from router.pool_order import pool_process as pool_process_of
from router.pool_process import PoolProcess

pytestmark = pytest.mark.anyio
KEEPER = Path(__file__).with_name("fake_keeper.py")
FFN = FFNSpec(num_experts=4, hidden_size=32, intermediate_size=16)
ORDER = PoolConfig(
    pool=None, workers=2, threads=1, redundancy=2, worker_memory=None, tls_dir="/tls", expert_bytes={1: 6144},
    model=ExpertModel(path=Path("/model"), dtype="float32", top_k=2, layers={1: FFN}, digest=b"d" * 16),
)  # fmt: skip


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def keeper(story: str, *, outlives_keeper: bool = False) -> AsyncIterator[PoolProcess]:
    command = (sys.executable, str(KEEPER), story)
    pool = PoolProcess(ORDER, transport="grpc", outlives_keeper=outlives_keeper, command=command)
    try:
        yield pool
    finally:
        await pool.close()
        assert not [child for child in psutil.Process().children() if str(KEEPER) in child.cmdline()]


async def test_a_pool_that_starts_tells_where_its_controller_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ORDER", str(tmp_path / "order"))
    seen: list[tuple[float, str]] = []
    async with keeper("starts") as pool:
        address = await pool.start(lambda *progress: seen.append(progress))
        assert (address.controller, address.token) == ("127.0.0.1:1", "secret")
        assert (address.tls_dir, address.transport) == ("/tls", "grpc")
        assert seen[0] == (0.5, "Ray")
        assert not pool.died.is_set()
        order = json.loads((tmp_path / "order").read_text())
        assert PoolConfig.from_json(json.dumps({name: order[name] for name in PoolConfig.__slots__})) == ORDER
        assert order["sid"] == order["pid"] != os.getsid(0)  # a terminal's Ctrl-C does not reach it
    assert pool.died.is_set()


async def test_progress_is_told_also_after_the_controller_serves() -> None:
    told = asyncio.Event()
    async with keeper("starts") as pool:
        await pool.start(lambda fraction, message: told.set() if message == "workers" else None)
        await asyncio.wait_for(told.wait(), 10)


async def test_a_fatal_event_is_an_error_in_the_keepers_words() -> None:
    async with keeper("fatal") as pool:
        with pytest.raises(BaristaError, match=r"10\.0\.0\.9:6379") as caught:
            await pool.start()
        assert caught.value.remedy == "Start one."


async def test_a_keeper_that_ends_without_a_word_is_an_error_with_its_status() -> None:
    async with keeper("ends") as pool:
        with pytest.raises(BaristaError, match="exit code 3"):
            await pool.start()


async def test_a_start_that_is_cancelled_leaves_no_keeper() -> None:
    async with keeper("hangs before ready") as pool:
        starting = asyncio.create_task(pool.start())
        await asyncio.sleep(0.1)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting


async def test_the_keepers_death_is_noticed() -> None:
    async with keeper("dies") as pool:
        await pool.start()
        await asyncio.wait_for(pool.died.wait(), 10)
        assert "keeper died" in pool.failure.message


async def test_the_keepers_last_words_are_the_reason() -> None:
    async with keeper("fatal later") as pool:
        await pool.start()
        await asyncio.wait_for(pool.died.wait(), 10)
        assert "10.0.0.9:6379" in pool.failure.message


async def test_a_keeper_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_process, "CLOSE_SECONDS", 0.2)
    async with keeper("deaf") as pool:
        await pool.start()


def test_the_order_names_experts_sizes_and_settings(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny")
    config = ServeConfig(workers=3, worker_threads=2, worker_memory=1 << 20, redundancy=1)
    order = pool_order(config, path)
    model = order.model
    per_expert = 3 * 32 * 16 * 4  # gate, up and down of 16 neurons over 32 values, in float32
    assert order == PoolConfig(
        pool=None, workers=3, threads=2, redundancy=1, worker_memory=1 << 20, tls_dir=None, model=model,
        expert_bytes={0: per_expert, 1: per_expert},
    )  # fmt: skip
    assert (model.path, model.dtype, model.top_k, model.num_experts) == (path, "float32", 2, 8)


def test_the_format_is_the_engines(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny")
    order = pool_order(ServeConfig(workers=1, format="bf16"), path)
    assert order.model.dtype == "bfloat16"
    assert set(order.expert_bytes.values()) == {3 * 32 * 16 * 2}


def test_a_dense_model_has_no_experts_to_place(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny", architectures=["Qwen3ForCausalLM"])
    with pytest.raises(ConfigError, match="has no experts"):
        pool_order(ServeConfig(workers=2), path)


def test_a_checkpoint_that_lacks_experts_is_named_before_anything_starts(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny")
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2"):
        pool_order(ServeConfig(workers=2), path)


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.pool_order.usable_cores", lambda: 8)
    assert [worker_threads(ServeConfig(workers=workers)) for workers in (1, 3, 8, 20)] == [8, 2, 1, 1]
    assert worker_threads(ServeConfig(workers=3, worker_threads=5)) == 5


@pytest.mark.parametrize(
    ("pool", "ray", "outlives"),
    [(None, None, False), (None, "", False), ("bar", None, True), (None, "10.0.0.9:6379", True)],
)
def test_which_pools_outlive_their_keeper(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pool: str | None, ray: str | None, outlives: bool
) -> None:
    monkeypatch.delenv(RAY_ADDRESS, raising=False)
    if ray is not None:
        monkeypatch.setenv(RAY_ADDRESS, ray)
    config = ServeConfig(workers=1, pool=pool)
    assert pool_process_of(config, write_tiny_model(tmp_path / "tiny")).outlives_keeper is outlives
