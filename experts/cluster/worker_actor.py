"""A worker as a Ray actor: the process that Ray places and restarts, with a gRPC server in it."""

from __future__ import annotations

from pathlib import Path

import ray

from barista.machine import available_memory
from barista.tracing import WORKER_SERVICE, open_tracer
from barista.trust import Trust
from experts.cluster.messages import PoolConfig

MEMORY_SHARE = 0.8  # of what is free; the rest is room for rows, windows and the other processes of the node


class WorkerActor:
    """name: worker-0. host: to listen on. neighbours: workers of the pool on this node, this one included.

    Rows never pass through Ray: its calls say where the server is, and no more.
    """

    def __init__(self, config: PoolConfig, token: str, name: str, host: str, neighbours: int) -> None:
        self._config = config
        self._token = token
        self._name = name
        self._host = host
        self._neighbours = neighbours
        self._address = ""

    def serve(self, capacity_bytes: int) -> tuple[str, str]:
        """Serve, unless it does already; returns host:port and the id of the node.

        capacity_bytes: what it had before a restart, because its neighbours now use what was free then; 0: unknown.
        Raises CheckpointError when its node lacks the checkpoint, ConfigError when it cannot listen.
        """
        if not self._address:
            # Imported here, because only this process needs torch.
            from experts.worker.server import WorkerServer

            self._server = WorkerServer(
                self._config.model,
                self._name,
                self._host,
                0,
                self._config.threads,
                capacity_bytes or self._config.worker_memory or self._share_of_memory(),
                Trust(self._token, Path(self._config.tls_dir) if self._config.tls_dir else None),
                open_tracer(self._config.trace_to, self._config.trace_ratio, WORKER_SERVICE, self._name),
            )
            self._address = self._server.address
        return self._address, ray.get_runtime_context().get_node_id()

    def _share_of_memory(self) -> int:
        return int(available_memory() * MEMORY_SHARE / self._neighbours)
