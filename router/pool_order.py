"""What pool a server wants, as it tells the pool's keeper. Torch-free."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from barista.balance import plan
from barista.config import ServeConfig
from barista.errors import ConfigError
from barista.machine import usable_cores
from barista.placement import Placement, WorkerCapacity
from experts.checkpoint import open_checkpoint
from experts.cluster.messages import PoolConfig
from experts.expert_model import ExpertModel, expert_bytes
from experts.formats import holding
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
    """The keeper's first line. A format of "auto" means: as stored.

    Raises as expert_model, CheckpointError for shapes that the format cannot take, and ConfigError for workers that
    cannot hold all experts.
    """
    checkpoint = open_checkpoint(path)
    model = expert_model(checkpoint, holding(checkpoint, config.format))
    if config.pool is None and config.worker_memory is not None:
        _require_room(model, expert_bytes(checkpoint, model), config.workers, config.worker_memory)
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
        controller_port=config.controller_port,
    )


def _require_room(model: ExpertModel, sizes: Mapping[int, int], workers: int, worker_memory: int) -> None:
    """Plan what the controller would plan, so that what cannot fit is refused before anything is started."""
    nothing = Placement.empty({layer: spec.num_experts for layer, spec in model.layers.items()})
    capacities = [WorkerCapacity(f"worker-{number}", worker_memory) for number in range(workers)]
    missing = plan({}, nothing, capacities, sizes, redundancy=1).missing_bytes
    if missing:
        needed = sum(size * model.layers[layer].num_experts for layer, size in sizes.items())
        enough = math.ceil(needed / workers) + max(sizes.values())
        raise ConfigError(
            f"{missing} bytes of memory for experts are missing: {workers} workers of {worker_memory} cannot hold "
            f"the {needed} bytes of all experts.",
            f"Give --worker-memory {enough}, or more --workers.",
        )


def worker_threads(config: ServeConfig) -> int:
    """Threads of each worker: as told, or its share of this machine's cores."""
    return config.worker_threads or max(1, usable_cores() // max(1, config.workers))


def trace_target(config: ServeConfig) -> str | None:
    """Where traces go; a file by its whole path, because workers run in other folders."""
    if config.trace_to is None or "://" in config.trace_to:
        return config.trace_to
    return str(Path(config.trace_to).resolve())
