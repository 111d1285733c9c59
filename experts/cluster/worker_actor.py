"""A worker as a Ray actor: the process that Ray places and restarts, with a gRPC server in it."""

from __future__ import annotations

import logging
from pathlib import Path

import ray
from ray.util.placement_group import get_current_placement_group, placement_group_table

from barista.errors import ConfigError
from barista.machine import available_memory
from barista.tracing import WORKER_SERVICE, open_tracer
from barista.trust import Trust
from experts.cluster.host import listening_host
from experts.cluster.messages import PoolConfig
from experts.health.watch import GpuWatch, watch_gpus

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.8  # of what is free; the rest is room for rows, windows and the other processes of the node


class WorkerActor:
    """name: worker-0. home: the address of the node where the pool was made.

    Rows never pass through Ray: its calls say where the server is, and no more.
    """

    def __init__(self, config: PoolConfig, token: str, name: str, home: str) -> None:
        self._config = config
        self._token = token
        self._name = name
        self._home = home
        self._address = ""

    def serve(self, capacity_bytes: int, node_id: str) -> tuple[str, str]:
        """Serve, unless it does already; returns host:port and the id of the node.

        capacity_bytes: what it had before a restart on the node node_id, because its neighbours now use what was free
        then; 0: unknown. On another node it counts anew. Raises CheckpointError when its node lacks the checkpoint,
        CacheError when it cannot pack its experts there, ConfigError when it cannot listen.
        """
        here = ray.get_runtime_context().get_node_id()
        if not self._address:
            known = capacity_bytes if here == node_id else 0
            capacity = known or self._config.worker_memory or int(available_memory() * MEMORY_SHARE / _neighbours(here))
            self._address = self._start(listening_host(self._config, self._home), capacity)
        return self._address, here

    def _start(self, host: str, capacity_bytes: int) -> str:
        """Start the server; returns host:port."""
        from experts.worker.server import WorkerServer  # here, because only this process needs torch

        self._server = WorkerServer(
            self._config.model,
            self._name,
            host,
            0,
            self._config.threads,
            capacity_bytes,
            Trust(self._token, Path(self._config.tls_dir) if self._config.tls_dir else None),
            open_tracer(self._config.trace_to, self._config.trace_ratio, WORKER_SERVICE, self._name),
            _gpus(),
        )
        return self._server.address


def _gpus() -> GpuWatch | None:
    """A watch over the GPUs that Ray gave this process; None for none, and where they cannot be looked at."""
    ids = [str(gpu) for gpu in ray.get_gpu_ids()]
    try:
        return watch_gpus(ids) if ids else None
    except ConfigError as error:
        log.warning("%s This worker goes on without.", error)
        return None


def _neighbours(node_id: str) -> int:
    """How many workers that were placed together share this node, this one included."""
    nodes = placement_group_table(get_current_placement_group())["bundles_to_node_id"]
    return max(1, list(nodes.values()).count(node_id))
