"""A worker: its experts behind a gRPC server."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from barista.trust import SERVER_OPTIONS, Trust
from experts import kernels
from experts.expert_model import ExpertModel
from experts.health.watch import GpuWatch
from experts.worker.service import MAX_ENGINES, ExpertsService
from experts.worker.store import ExpertStore

if TYPE_CHECKING:
    from barista.tracer import Tracer

SERVICE = "barista.v1.Experts"


class WorkerServer:
    """Serves from its construction until `stop`.

    name: worker-0. host, port: to listen on; port 0 takes a free one. threads: that compute. capacity_bytes: of expert
    weights. tracer: None without traces; `stop` flushes it. gpus: what watches the GPUs that it computes on, None
    without; `stop` closes it. Raises CheckpointError, and ConfigError when the address cannot be had.
    """

    def __init__(
        self,
        model: ExpertModel,
        name: str,
        host: str,
        port: int,
        threads: int,
        capacity_bytes: int,
        trust: Trust,
        tracer: Tracer | None = None,
        gpus: GpuWatch | None = None,
    ) -> None:
        kernels.set_num_threads(threads)
        torch.set_num_threads(threads)
        self.name = name
        self.pid = os.getpid()
        self.store = ExpertStore(model, capacity_bytes)
        self._tracer = tracer
        self._gpus = gpus
        self._health = health.HealthServicer()
        self._executor = ThreadPoolExecutor(2 * MAX_ENGINES, thread_name_prefix=name)
        self._server = grpc.server(self._executor, interceptors=(trust.interceptor(),), options=SERVER_OPTIONS)
        service = ExpertsService(self.store, name, self._set_draining, tracer, gpus)
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, service.handlers())])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.address = f"{host}:{trust.add_port(self._server, f'{host}:{port}')}"
        self._set_draining(False)
        self._server.start()

    def stop(self, grace: float = 0.5) -> None:
        """End every call, after `grace` seconds those that are under way, too. Returns when all threads have ended."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait()
        self._executor.shutdown()
        if self._tracer is not None:
            self._tracer.flush()
        if self._gpus is not None:
            self._gpus.close()

    def _set_draining(self, draining: bool) -> None:
        serving = health_pb2.HealthCheckResponse
        status = serving.NOT_SERVING if draining else serving.SERVING
        for service in ("", SERVICE):
            self._health.set(service, status)
