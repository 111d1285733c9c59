"""`barista keep`: a deployment's job inside the Ray cluster. It orders pool and engines, and keeps them there."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path

import typer

from barista.config import ServeConfig
from barista.errors import ConfigError
from barista.trust import deployment_token
from router.assemble import format_choice
from router.ending import Ending
from router.launch import prepared
from router.log import log_to_stderr
from router.pool_order import pool_order
from router.pool_process import PoolProcess

log = logging.getLogger(__name__)

# What an engine of a deployment is not told: its pool is kept by others.
NOT_OF_AN_ENGINE = (
    "host",
    "port",
    "grpc_port",
    "workers",
    "pool",
    "redundancy",
    "worker_threads",
    "worker_memory",
    "controller_port",
)


def keep(config: ServeConfig, engines: int, engine_port: int) -> int:
    """Keep them until a signal; they outlive it. Returns the exit status. Raises BaristaError."""
    log_to_stderr(config.log_level)
    deployment_token(os.environ)
    require_deployable(config, engines)
    path = prepared(config.model)
    # Engines run in other folders, and do not choose the format anew.
    tls_dir = None if config.tls_dir is None else config.tls_dir.resolve()
    model = str(path.resolve()) if Path(config.model).exists() else config.model
    config = replace(config, model=model, tls_dir=tls_dir, format=format_choice(config, path).format)
    order = replace(
        pool_order(config, path), engines=engines, engine_command=tuple(engine_command(config, engine_port))
    )
    process = PoolProcess(order, transport=config.transport, outlives_keeper=True)
    return asyncio.run(_keep(process))


def require_deployable(config: ServeConfig, engines: int) -> None:
    """Raise ConfigError for what no deployment can be."""
    if config.pool is None or config.workers < 1 or engines < 1:
        raise ConfigError(
            f"A deployment has a pool with a name, workers and engines, not pool {config.pool}, {config.workers} "
            f"workers and {engines} engines.",
            "Give --pool NAME, --workers N and --engine-replicas N.",
        )


def flags(config: ServeConfig, leave_out: Sequence[str] = ()) -> list[str]:
    """The command line that makes this configuration, what is as by default left out; MODEL comes first."""
    words = [config.model]
    for entry in fields(config):
        value = getattr(config, entry.name)
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if entry.name != "model" and value != default and entry.name not in leave_out:
            words += [f"--{entry.name.replace('_', '-')}", str(value)]
    return words


def engine_command(config: ServeConfig, port: int) -> list[str]:
    """What an engine of this deployment runs, but for where it listens and which controller it asks."""
    return ["barista", "engine", *flags(config, NOT_OF_AN_ENGINE), "--port", str(port)]


async def _keep(process: PoolProcess) -> int:
    ending = Ending()
    ending.watch(until_eof=False)
    said = ""

    def say(fraction: float, message: str) -> None:
        nonlocal said
        if message != said:
            said = message
            typer.echo(message)

    try:
        await process.start(say)
        ends = [asyncio.create_task(event.wait()) for event in (ending.now, ending.drain, process.died)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if process.died.is_set():
            raise process.failure
        return 0
    finally:
        await process.close()
