"""The controller as a Ray actor: one per pool, restarted for ever, with the pool's gRPC server in it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from barista.errors import BaristaError, ConfigError
from barista.trust import Trust
from experts.cluster.host import listening_host
from experts.cluster.messages import PoolConfig
from experts.cluster.serving_thread import ServingThread
from experts.cluster.workers import RayWorkers
from experts.controller.lease import Lease
from experts.controller.runner import Runner
from experts.controller.service import serve
from experts.controller.state import Pool, PoolSettings
from experts.controller.wire import probe_row

log = logging.getLogger(__name__)

NAME = "barista-controller"
LEASE_CHECK_SECONDS = 0.5
PORT_SECONDS = 5.0  # for the port of the controller before this one
PORT_RETRY_SECONDS = 0.25


class ControllerActor:
    """Serves from its construction, in a thread with an event loop of its own; a restarted one serves at the same port.

    home: the address of the node where the pool is made, and of its engines. The workers that it finds in the namespace
    are the pool's.
    """

    def __init__(self, config: PoolConfig, token: str, namespace: str, home: str) -> None:
        self._config = config
        self._token = token
        self._namespace = namespace
        self._home = home
        self._workers = RayWorkers(config, token, namespace, home)
        self._lease = Lease(time.monotonic())
        self._pool = Pool(
            PoolSettings(
                name=config.pool,
                model_digest=config.model.digest,
                layers={layer: spec.num_experts for layer, spec in config.model.layers.items()},
                expert_bytes=config.expert_bytes,
                redundancy=config.redundancy,
            ),
            time.monotonic(),
            found=self._workers.found(),
        )
        self._address = ""
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self._thread = ServingThread(self._main, restarted=restarted)

    def about(self) -> tuple[str, str, bytes, str]:
        """(host:port, token, the model's digest, the model's path)."""
        return self._address, self._token, self._config.model.digest, str(self._config.model.path)

    def order(self) -> PoolConfig:
        """What the pool was made by."""
        return self._config

    def start_workers(self) -> None:
        """Place the first workers; they start on their own. Raises ConfigError when they cannot be placed."""
        asyncio.run_coroutine_threadsafe(self._start_workers(), self._thread.loop).result()

    def keep_alive(self) -> None:
        """The keeper lives: a pool without a name does not end."""
        self._lease.renew(time.monotonic())

    def tear_down(self) -> None:
        """Kill the workers. The caller then kills this actor."""
        self._workers.stop_all()

    async def _main(self, serves: Callable[[], None]) -> None:
        trust = Trust(self._token, Path(self._config.tls_dir) if self._config.tls_dir else None)
        model = self._config.model
        runner = self._runner = Runner(self._pool, self._workers, trust, probe_row(model.hidden_size, model.dtype))
        server = await self._serve(trust)
        serves()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(runner.run())
                if self._config.pool is None:
                    tasks.create_task(self._end_when_abandoned())
        finally:
            await server.stop(None)

    async def _serve(self, trust: Trust) -> grpc.aio.Server:
        """At the address of the controller before this one, which engines know, unless that was on another node."""
        host = listening_host(self._config, self._home)
        key = f"barista/{self._namespace}/address"
        old_host, _, old_port = (_internal_kv_get(key) or b"").decode().rpartition(":")
        port = self._config.controller_port or (int(old_port) if old_host == host else 0)
        deadline = time.monotonic() + PORT_SECONDS
        while True:
            try:
                server, port = await serve(self._runner, trust, f"{host}:{port}")
                break
            except ConfigError:
                if port == 0 or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(PORT_RETRY_SECONDS)
        self._address = f"{host}:{port}"
        _internal_kv_put(key, self._address)
        return server

    async def _start_workers(self) -> None:
        if self._pool.members:  # two servers have made the pool at the same moment
            return
        names = self._pool.add(self._config.workers, time.monotonic())
        self._runner.wake()
        try:
            await self._workers.start(names)
        except BaristaError:
            for name in names:
                await self._runner.forget(name)
            raise

    async def _end_when_abandoned(self) -> None:
        while not self._lease.is_over(time.monotonic(), engines=len(self._pool.engines)):
            await asyncio.sleep(LEASE_CHECK_SECONDS)
        log.warning("Nobody uses this pool any more: it ends.")
        await asyncio.to_thread(self.tear_down)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)  # the end of this process
