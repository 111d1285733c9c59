"""The pool's state for the Kubernetes side of `barista deploy`: asked of whichever Ray pod runs the controller."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

from barista.config import ServeConfig
from barista.errors import ConfigError, EngineFailed, RequestError
from barista.trust import Trust, deployment_token
from router.engines import Engines
from router.kubernetes.cluster_side import ClusterSide
from router.kubernetes.discovery import watch_endpoints
from router.messages import PoolAddress
from router.pool_client import PoolClient

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0


class PoolFollower:
    """Asks the controller among `addresses`, which come and go with the pods. trust: of the deployment."""

    def __init__(self, token: str, tls_dir: str | None) -> None:
        self.addresses: frozenset[str] = frozenset()
        self._token = token
        self._tls_dir = tls_dir
        self._client: PoolClient | None = None

    async def state(self) -> Any | None:
        """The pool's state (PoolState of barista.v1); None while no address answers as its controller."""
        if self._client is not None:
            with contextlib.suppress(RequestError):
                return await self._client.state()
            await self.close()
        for address in sorted(self.addresses):
            self._client = self._client_at(address)
            with contextlib.suppress(RequestError):
                return await self._client.state()
            await self.close()
        return None

    async def close(self) -> None:
        """End the connection. Idempotent."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    def _client_at(self, address: str) -> PoolClient:
        return PoolClient(lambda: PoolAddress(controller=address, token=self._token, tls_dir=self._tls_dir))


async def follow_pool(
    config: ServeConfig,
    release: str,
    groups: tuple[int, int, int] | None,
    on_workers: Callable[[int], object],
) -> None:
    """Tell the pods of the Helm release NAMESPACE/NAME how the pool stands, until cancelled.

    groups: as DeployOptions.groups. on_workers: told, with groups, how many workers the pods have room for. Raises
    ConfigError where no API server is known.
    """
    try:
        await _follow(config, release, groups, on_workers)
    except* ConfigError as errors:
        raise errors.exceptions[0] from None


async def _follow(
    config: ServeConfig, release: str, groups: tuple[int, int, int] | None, on_workers: Callable[[int], object]
) -> None:
    namespace, _, name = release.partition("/")
    token = deployment_token(os.environ)
    follower = PoolFollower(token, None if config.tls_dir is None else str(config.tls_dir))
    async with contextlib.AsyncExitStack() as stack:
        side = await stack.enter_async_context(contextlib.aclosing(ClusterSide(namespace, name, groups=groups)))
        stack.push_async_callback(follower.close)
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        tasks.create_task(_follow_addresses(follower, watch_endpoints(namespace, f"{name}-ray", "controller")))
        engines = None
        if groups is not None:
            engines = Engines(
                lambda: watch_endpoints(namespace, f"{name}-ray", "engine"), Trust(token, config.tls_dir), token, ""
            )
            stack.push_async_callback(engines.close)
            tasks.create_task(engines.start(lambda fraction, message: None))
        while True:
            state = await follower.state()
            if state is not None:
                await side.observe(state, None if engines is None else await _waiting(engines))
            if side.workers_wanted is not None:
                on_workers(side.workers_wanted)
            await asyncio.sleep(LOOK_SECONDS)


async def _follow_addresses(follower: PoolFollower, found: AsyncIterator[frozenset[str]]) -> None:
    async for addresses in found:
        follower.addresses = addresses


async def _waiting(engines: Engines) -> int | None:
    """Requests that wait in the engines, whoever sent them; None while none of them answers."""
    try:
        return (await engines.all_stats()).num_requests_waiting
    except EngineFailed:
        return None
