"""Workers on a simulated cluster of five nodes with fake GPUs and labels, in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from barista.errors import ConfigError

ROOT = Path(__file__).parents[2]
NODES = 5
NAMESPACE = "barista-test"


@pytest.mark.long
def test_workers_are_spread_with_a_gpu_each_and_move_when_their_node_dies(tmp_path: Path) -> None:
    from tests.distributed.workers import tiny_expert_model  # which needs torch; the simulation does without

    model = tiny_expert_model(tmp_path / "model")
    (tmp_path / "model.json").write_text(model.to_json())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.distributed.test_ray_nodes", str(tmp_path / "model.json")],
        cwd=ROOT,
        env=environment | {"BARISTA_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    seen = json.loads(ran.stdout.splitlines()[-1])
    assert seen["found"] == [f"worker-{2 * number}" for number in range(NODES)]
    assert len(set(seen["nodes"])) == NODES
    assert seen["gpus_used"] == NODES
    assert sorted(seen["domains"]) == [f"zone-{number}" for number in range(NODES)]
    assert seen["gpus_after_stop"] == NODES  # the group goes with its last worker
    assert seen["gpus_after_stop_of_all"] == 0
    message, remedy = seen["refusal"]
    assert "Only 10 of 11 workers" in message
    assert "1 barista_worker" in message
    assert "ray start --resources='{\"barista_worker\": 11}'" in remedy
    assert seen["left_pending"] == 0
    for host, node_host in seen["hosts_before"] + seen["hosts_after"]:
        assert host == node_host
    moved, restarted = range(2)
    assert seen["hosts_before"][moved] != seen["hosts_after"][moved]
    assert seen["hosts_before"][restarted] == seen["hosts_after"][restarted]


def simulate(model_file: Path) -> dict[str, Any]:
    """What happens on five nodes that each offer two places and one GPU (the head and four more)."""
    import ray
    from ray.cluster_utils import Cluster

    from experts.cluster import workers as placing
    from experts.cluster.messages import PoolConfig
    from experts.cluster.worker_actor import WorkerActor
    from experts.expert_model import ExpertModel

    class LightWorker(WorkerActor):
        """A worker that places itself as all do, without the server and its torch: its port is its process's id."""

        def _start(self, host: str, capacity_bytes: int) -> str:
            return f"{host}:{os.getpid()}"

    placing.PLACE_SECONDS = 2.0
    placing.WorkerActor = LightWorker
    model = ExpertModel.from_json(model_file.read_text())
    config = PoolConfig(
        pool="test",
        workers=NODES,
        threads=1,
        redundancy=1,
        worker_memory=None,
        tls_dir="/certs",
        model=model,
        expert_bytes=dict.fromkeys(model.layers, 1),
    )
    cluster = Cluster()
    for number in range(NODES):
        cluster.add_node(
            wait=number == 0,  # the others start side by side
            **({"node_ip_address": f"127.0.0.{number + 1}"} if number else {}),
            num_cpus=1,
            num_gpus=1,
            resources={"barista_worker": 2},
            labels={"ray.io/availability-zone": f"zone-{number}"},
            object_store_memory=80 << 20,
            include_dashboard=False,
        )
    try:
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False, logging_level="error")
        pool = placing.RayWorkers(config, "token", NAMESPACE, ray.util.get_node_ip_address())
        return asyncio.run(_place(ray, placing, pool)) | asyncio.run(_hurt(ray, placing, pool, cluster))
    finally:
        ray.shutdown()
        cluster.shutdown()


async def _place(ray: Any, placing: Any, pool: Any) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    names = [f"worker-{2 * number}" for number in range(NODES)]

    def gpus_used() -> float:
        return float(ray.cluster_resources()["GPU"] - ray.available_resources().get("GPU", 0))

    try:
        await pool.start([f"worker-{number}" for number in range(11)])
    except ConfigError as error:
        seen["refusal"] = [error.message, error.remedy]
    seen["left_pending"] = sum(table["state"] == "PENDING" for table in placing.placement_group_table().values())
    await pool.start(names)
    seen["found"] = sorted(pool.found())
    groups = [table for table in placing.placement_group_table().values() if table["state"] == "CREATED"]
    seen["nodes"] = [node for table in groups for node in table["bundles_to_node_id"].values()]
    seen["domains"] = [placing._domain(node) for node in seen["nodes"]]
    seen["gpus_used"] = gpus_used()
    await pool.stop("worker-4")
    seen["gpus_after_stop"] = gpus_used()
    pool.stop_all()
    while gpus_used():
        await asyncio.sleep(0.1)
    seen["gpus_after_stop_of_all"] = gpus_used()
    return seen


async def _hurt(ray: Any, placing: Any, pool: Any, cluster: Any) -> dict[str, Any]:
    """Two workers serve; the node of one is removed, the process of the other killed. Ends when both serve again."""
    names = ["worker-20", "worker-21"]

    async def look(when: str) -> dict[str, Any]:
        where = await asyncio.gather(*(pool.locate(name, 0) for name in names))
        hosts = {node["NodeID"][:12]: node["NodeManagerAddress"] for node in ray.nodes()}
        found = [(location.address.split(":")[0], hosts[location.node]) for location in where]
        pids = [location.address.split(":")[1] for location in where]
        return {f"hosts_{when}": found, f"pids_{when}": pids, f"ids_{when}": [location.node for location in where]}

    await pool.start(names)
    before = await look("before")
    if before["ids_before"][0] == cluster.head_node.node_id[:12]:
        names.reverse()
        before = await look("before")
    lost = next(node for node in cluster.worker_nodes if node.node_id[:12] == before["ids_before"][0])
    cluster.remove_node(lost)
    await pool.restart(names[1])
    while (after := await look("after"))["pids_after"][1] == before["pids_before"][1]:  # a kill takes a moment
        await asyncio.sleep(0.1)
    return before | after


if __name__ == "__main__":
    print(json.dumps(simulate(Path(sys.argv[1]))))
