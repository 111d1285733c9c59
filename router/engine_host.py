"""`barista engine`: one engine and the gRPC server by which the APIs of other hosts reach it.

SIGTERM drains: open requests have drain_timeout to finish, the others go on at another engine. SIGINT, and a second
SIGTERM, end at once. An engine that dies, or makes no progress, ends the process with an error: whoever started it
starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import typer

from barista import __version__
from barista.addresses import join
from barista.config import ServeConfig
from barista.errors import BaristaError, ConfigError
from barista.trust import Trust, deployment_token
from router.assemble import engine_config, format_choice
from router.console import progress
from router.ending import Ending, first
from router.engine_process import EngineChild, EngineProcess
from router.engine_service import EngineService
from router.launch import prepared
from router.log import log_to_stderr
from router.loopback import is_loopback
from router.messages import Greeting, PoolAddress
from router.tokenizer import Tokenizer

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0


def serve_engine(config: ServeConfig, *, until_eof: bool = False) -> int:
    """Serve until a signal (or, with until_eof, the end of standard input); returns the exit status.

    Raises BaristaError.
    """
    log_to_stderr(config.log_level)
    trust = engine_trust(config)
    path = prepared(config.model)
    with contextlib.closing(EngineChild()) as child:
        tokenizer = Tokenizer.from_checkpoint(path)
        config = replace(config, format=format_choice(config, path).format)
        engine = EngineProcess(engine_config(config, path, tokenizer.eos_token_ids), child)
        host = EngineHost(engine, tokenizer.digest, _pool(config), drain_timeout=config.drain_timeout)
        address = join(config.host, config.port)
        return asyncio.run(host.run(trust, address, lambda: _announce(config, path), until_eof=until_eof))


def engine_trust(config: ServeConfig) -> Trust:
    """What engines and their APIs show each other. Raises ConfigError where it would not be enough."""
    token = deployment_token(os.environ)
    if config.tls_dir is None and not is_loopback(config.host):
        raise ConfigError(
            f"An engine that listens on {config.host} without encryption is refused.",
            "Give --tls-dir with ca.pem, cert.pem and key.pem, or listen on 127.0.0.1.",
        )
    return Trust(token, config.tls_dir)


class EngineHost:
    """tokenizer: Tokenizer.digest. pool: where the experts are, if not in the engine. drain_timeout: seconds."""

    def __init__(
        self, engine: EngineProcess, tokenizer: str, pool: PoolAddress | None = None, *, drain_timeout: float
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._pool = pool
        self._drain_timeout = drain_timeout

    async def run(self, trust: Trust, address: str, on_ready: Callable[[], None], *, until_eof: bool) -> int:
        """Serve at host:port until something ends it. Returns the exit status; raises BaristaError."""
        ending = Ending()
        ending.watch(until_eof=until_eof)
        now, drain = ending.now, ending.drain
        service = EngineService(self._engine, self._greeting)
        server, _ = await service.serve(trust, address)
        try:
            if await self._load(now, drain):
                await service.set_serving()
                on_ready()
                await first(now.wait(), drain.wait(), self._lost())
                if drain.is_set():
                    log.info("Draining: open requests have %g s to finish.", self._drain_timeout)
                    await first(service.drain(self._drain_timeout), now.wait(), self._lost())
        finally:
            await server.stop(0.5)
            await self._engine.close()
        return 0

    async def _load(self, now: asyncio.Event, drain: asyncio.Event) -> bool:
        """False if a signal came first."""
        with progress("Loading") as on_progress:
            loading = asyncio.create_task(self._engine.start(on_progress, self._pool))
            await first(loading, now.wait(), drain.wait())
            if loading.done():
                loading.result()
                return True
            loading.cancel()
            await asyncio.wait((loading,))
            return False

    def _greeting(self) -> Greeting:
        controller = "" if self._pool is None else self._pool.controller
        return Greeting(version=__version__, model=self._engine.model, tokenizer=self._tokenizer, controller=controller)

    async def _lost(self) -> None:
        """Raises BaristaError when the engine has died or hangs."""
        while await self._engine.makes_progress():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._engine.died.wait(), LOOK_SECONDS)
                raise BaristaError("The engine died; the lines above may say why.", "Start it again.")
        raise BaristaError("The engine has made no progress for minutes.", "Start it again.")


def _pool(config: ServeConfig) -> PoolAddress | None:
    if (config.workers and config.device == "cpu") or config.pool is not None:
        raise ConfigError(
            "barista engine starts no pool of workers.",
            "Give --controller HOST:PORT of a pool that runs, or let `barista deploy` start both.",
        )
    if config.controller is None:
        return None
    tls_dir = None if config.tls_dir is None else str(config.tls_dir.resolve())
    return PoolAddress(
        controller=config.controller, token=deployment_token(os.environ), tls_dir=tls_dir, transport=config.transport
    )


def _announce(config: ServeConfig, path: Path) -> None:
    typer.echo(f"Ready: engine of {path} at {config.host}:{config.port}")
