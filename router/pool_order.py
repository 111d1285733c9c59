"""What pool a server wants, as it tells the pool's keeper. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path

from barista.config import ServeConfig
from barista.machine import usable_cores
from experts.checkpoint import open_checkpoint
from experts.cluster.messages import PoolConfig
from experts.expert_model import expert_bytes
from experts.formats import held_dtype
from router.model.expert_model import expert_model
from router.pool_process import PoolProcess

RAY_ADDRESS = "RAY_ADDRESS"  # Ray's own variable: the cluster to join


def pool_process(config: ServeConfig, path: Path) -> PoolProcess:
    """The keeper of the pool that `config` asks for, not started yet. Raises ConfigError for a dense model."""
    return PoolProcess(
        pool_order(config, path),
        transport=config.transport,
        outlives_keeper=config.pool is not None or bool(os.environ.get(RAY_ADDRESS)),
    )


def pool_order(config: ServeConfig, path: Path) -> PoolConfig:
    """The keeper's first line. Raises as expert_model."""
    checkpoint = open_checkpoint(path)
    model = expert_model(checkpoint, held_dtype(checkpoint, config.format))
    return PoolConfig(
        pool=config.pool,
        workers=config.workers,
        threads=worker_threads(config),
        redundancy=config.redundancy,
        worker_memory=config.worker_memory,
        tls_dir=None if config.tls_dir is None else str(config.tls_dir.resolve()),
        model=model,
        expert_bytes=expert_bytes(checkpoint, model),
        trace_to=trace_target(config),
        trace_ratio=config.trace_ratio,
    )


def worker_threads(config: ServeConfig) -> int:
    """Threads of each worker: as told, or its share of this machine's cores."""
    return config.worker_threads or max(1, usable_cores() // max(1, config.workers))


def trace_target(config: ServeConfig) -> str | None:
    """Where traces go; a file by its whole path, because workers run in other folders."""
    if config.trace_to is None or "://" in config.trace_to:
        return config.trace_to
    return str(Path(config.trace_to).resolve())
