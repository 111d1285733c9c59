"""A pool whose every connection is encrypted: controller, worker and engine in one process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from barista.trust import Trust
from experts import kernels
from experts.checkpoint import open_checkpoint
from experts.controller.runner import Location, Runner
from experts.controller.service import serve
from experts.controller.state import Pool, PoolSettings
from experts.controller.wire import probe_row
from experts.expert_model import ExpertModel, expert_bytes
from experts.numerics import numerics_id
from experts.remote import PoolConfig, RemotePool
from experts.worker.server import WorkerServer
from tests.distributed.certificates import certificates
from tests.distributed.workers import tiny_expert_model

SECONDS = 10.0


@dataclass
class OneWorker:
    """experts.controller.runner.Workers: a server that is there already."""

    server: WorkerServer

    async def start(self, names: list[str]) -> None:
        pass

    async def locate(self, name: str, capacity_bytes: int) -> Location:
        return Location(self.server.address, "node")

    async def restart(self, name: str) -> None:
        raise AssertionError("it is well")

    async def stop(self, name: str) -> None:
        raise AssertionError("it is wanted")


@contextmanager
def controller(model: ExpertModel, worker: WorkerServer, trust: Trust) -> Iterator[str]:
    """The address of a controller of this worker, in an event loop of its own."""
    sizes = expert_bytes(open_checkpoint(model.path), model)
    layers = {layer: spec.num_experts for layer, spec in model.layers.items()}
    pool = Pool(PoolSettings(name=None, model_digest=model.digest, layers=layers, expert_bytes=sizes, redundancy=1))
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    addresses: list[str] = []
    serves = threading.Event()

    async def main() -> None:
        runner = Runner(pool, OneWorker(worker), trust, probe_row(model.hidden_size, model.dtype))
        pool.add(1, runner.clock())
        server, port = await serve(runner, trust, "127.0.0.1:0")
        addresses.append(f"127.0.0.1:{port}")
        serves.set()
        running = asyncio.create_task(runner.run())
        await stop.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await server.stop(None)

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    try:
        assert serves.wait(SECONDS)
        yield addresses[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(SECONDS)
        loop.close()


def test_a_pool_works_with_certificates(tmp_path: Path) -> None:
    model = tiny_expert_model(tmp_path / "model")
    trust = Trust("token", certificates(tmp_path / "tls"))
    server = WorkerServer(model, "worker-0", "127.0.0.1", 0, 1, 1 << 20, trust)
    try:
        with controller(model, server, trust) as address:
            pool = RemotePool(
                model,
                dict.fromkeys(model.layers, 0),
                PoolConfig(
                    controller=address,
                    trust=trust,
                    transport="grpc",
                    numerics_id=numerics_id(torch.float32),
                    max_rows=8,
                ),
            )
            pool.start()
            try:
                pool.wait_covered(lambda fraction, message: None)
                rows, failed = pool.experts.begin(
                    0, 0, torch.ones(1, 32), torch.tensor([[0, 3]], dtype=torch.int32), torch.ones(1, 2)
                ).wait()
            finally:
                pool.close()
        assert not failed.any()
        assert rows.any()
    finally:
        server.stop(0)
        kernels.set_num_threads(2)
        torch.set_num_threads(2)
