"""A worker leaves failing hardware: on a simulated node with two GPUs, in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NAMESPACE = "barista-test"


@pytest.mark.alone
def test_a_worker_moves_to_a_free_gpu_and_its_old_one_is_given_to_nobody(tmp_path: Path) -> None:
    from tests.distributed.workers import tiny_expert_model  # which needs torch; the simulation does without

    (tmp_path / "model.json").write_text(tiny_expert_model(tmp_path / "model").to_json())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.distributed.test_ray_move", str(tmp_path / "model.json")],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    before, moved, again = json.loads(ran.stdout.splitlines()[-1])["lives"]
    assert moved["gpu"] != before["gpu"]
    assert moved["free"] == 0
    assert again["gpu"] == moved["gpu"]  # no third one is free
    assert len({life["pid"] for life in (before, moved, again)}) == 3
    assert json.loads(ran.stdout.splitlines()[-1])["free_after_stop"] == 2


def simulate(model_file: Path) -> dict[str, Any]:
    """One worker that is moved twice, then stopped."""
    import ray

    from experts.cluster import workers as placing
    from experts.cluster.messages import PoolConfig
    from experts.cluster.worker_actor import WorkerActor
    from experts.expert_model import ExpertModel

    class LightWorker(WorkerActor):
        """A worker without the server and its torch: its host is its GPU, its port its process's id."""

        def _start(self, host: str, capacity_bytes: int) -> str:
            return f"{ray.get_gpu_ids()[0]}:{os.getpid()}"

    placing.PLACE_SECONDS = 2.0
    placing.WorkerActor = LightWorker
    model = ExpertModel.from_json(model_file.read_text())
    config = PoolConfig(
        pool="test",
        workers=1,
        threads=1,
        redundancy=1,
        worker_memory=1,
        tls_dir=None,
        model=model,
        expert_bytes=dict.fromkeys(model.layers, 1),
    )
    ray.init(
        address="local", namespace=NAMESPACE, include_dashboard=False, num_cpus=1, num_gpus=2, log_to_driver=False,
        logging_level="error", resources={"barista_worker": 4}, object_store_memory=80 << 20,
    )  # fmt: skip
    try:
        return asyncio.run(_live(ray, placing.RayWorkers(config, "token", NAMESPACE, ray.util.get_node_ip_address())))
    finally:
        ray.shutdown()


async def _live(ray: Any, pool: Any) -> dict[str, Any]:
    await pool.start(["worker-0"])
    lives = [await _life(ray, pool)]
    for _ in range(2):
        await pool.move("worker-0")
        lives.append(await _life(ray, pool, other_than=lives[-1]["pid"]))
    await pool.stop("worker-0")
    async with asyncio.timeout(30):
        while _free(ray) < 2:
            await asyncio.sleep(0.1)
    return {"lives": lives, "free_after_stop": _free(ray)}


async def _life(ray: Any, pool: Any, other_than: str = "") -> dict[str, Any]:
    async with asyncio.timeout(30):
        while True:
            gpu, _, pid = (await pool.locate("worker-0", 1)).address.partition(":")
            if pid != other_than:
                return {"gpu": gpu, "pid": pid, "free": _free(ray)}
            await asyncio.sleep(0.1)


def _free(ray: Any) -> float:
    return float(ray.available_resources().get("GPU", 0))


if __name__ == "__main__":
    print(json.dumps(simulate(Path(sys.argv[1]))))
