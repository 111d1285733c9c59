"""The controller as a Ray actor: one per pool, restarted for ever, with the pool's gRPC server in it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from pathlib import Path

import ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from barista.errors import BaristaError
from barista.trust import Trust
from experts.cluster.messages import PoolConfig
from experts.cluster.workers import RayWorkers
from experts.controller.lease import Lease
from experts.controller.runner import Runner
from experts.controller.service import serve
from experts.controller.state import Pool, PoolSettings
from experts.controller.wire import probe_row

log = logging.getLogger(__name__)

NAME = "barista-controller"
LEASE_CHECK_SECONDS = 0.5


class ControllerActor:
    """Serves from its construction, in a thread with an event loop of its own; a restarted one serves at the same port.

    host: to listen on, and of the engines. The workers that it finds in the namespace are the pool's.
    """

    def __init__(self, config: PoolConfig, token: str, namespace: str, node_host: str, host: str) -> None:
        self._config = config
        self._token = token
        self._namespace = namespace
        self._host = host
        self._workers = RayWorkers(config, token, namespace, node_host)
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
        self._failure: BaseException | None = None
        self._serving = threading.Event()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, name="controller", daemon=True).start()
        self._serving.wait()
        if self._failure is not None:
            raise self._failure

    def about(self) -> tuple[str, str, bytes, str]:
        """(host:port, token, the model's digest, the model's path)."""
        return self._address, self._token, self._config.model.digest, str(self._config.model.path)

    def start_workers(self) -> None:
        """Place the first workers; they start on their own. Raises ConfigError when they cannot be placed."""
        asyncio.run_coroutine_threadsafe(self._start_workers(), self._loop).result()

    def keep_alive(self) -> None:
        """The keeper lives: a pool without a name does not end."""
        self._lease.renew(time.monotonic())

    def tear_down(self) -> None:
        """Kill the workers. The caller then kills this actor."""
        self._workers.stop_all()

    def _run(self) -> None:
        try:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(self._main())
        except BaseException as error:  # of any kind: the constructor raises it
            self._failure = error
            log.exception("The controller ended.")
        finally:
            self._serving.set()

    async def _main(self) -> None:
        trust = Trust(self._token, Path(self._config.tls_dir) if self._config.tls_dir else None)
        model = self._config.model
        runner = self._runner = Runner(self._pool, self._workers, trust, probe_row(model.hidden_size, model.dtype))
        key = f"barista/{self._namespace}/port"
        port = int(_internal_kv_get(key) or 0)
        _, port = await serve(runner, trust, f"{self._host}:{port}")
        _internal_kv_put(key, str(port))
        self._address = f"{self._host}:{port}"
        self._serving.set()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(runner.run())
            if self._config.pool is None:
                tasks.create_task(self._end_when_abandoned())

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
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
