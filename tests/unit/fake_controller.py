"""A pool's controller without a pool: answers from a state that a test sets, and refuses what the test says."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from barista.trust import Trust
from barista.v1 import controller_pb2 as pb
from barista.v1.controller_pb2_grpc import ControllerServicer, add_ControllerServicer_to_server
from router.messages import PoolAddress
from router.pool_client import PoolClient

TOKEN = "of-this-deployment"


def two_workers() -> pb.PoolState:
    """Two ready workers and two experts of layer 1; the second expert has two replicas."""
    workers = [
        pb.Worker(
            name=f"worker-{index}", address=f"127.0.0.1:{7000 + index}", pid=100 + index, node="here",
            state=pb.WORKER_STATE_READY, numerics_id="fake-f32", capacity_bytes=4000, held_bytes=2000,
        )
        for index in range(2)
    ]  # fmt: skip
    experts = [pb.ExpertReplicas(workers=["worker-0"]), pb.ExpertReplicas(workers=["worker-0", "worker-1"])]
    return pb.PoolState(
        term=1, epoch=3, workers=workers, layers=[pb.LayerPlacement(layer=1, experts=experts)], coverage=1.0, moves=5,
        engines=1,
    )  # fmt: skip


class FakeController(ControllerServicer):
    """state: what every call answers. refusal: ends every call but GetState. calls: the requests, in order."""

    def __init__(self) -> None:
        self.state = two_workers()
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        self.calls: list[Any] = []
        self.port = 0

    def GetState(self, request: Any, context: grpc.ServicerContext) -> pb.PoolState:
        return self.state

    def Drain(self, request: Any, context: grpc.ServicerContext) -> pb.PoolState:
        return self._obey(request, context)

    def Scale(self, request: Any, context: grpc.ServicerContext) -> pb.PoolState:
        return self._obey(request, context)

    def Rebalance(self, request: Any, context: grpc.ServicerContext) -> pb.RebalanceReply:
        state = self._obey(request, context)
        move = pb.Move(layer=1, expert=0, to="worker-1")
        return pb.RebalanceReply(moves=[move], imbalance_before=1.5, imbalance_after=1.25, state=state)

    def client(self, token: str = TOKEN) -> PoolClient:
        address = PoolAddress(controller=f"127.0.0.1:{self.port}", token=token)
        return PoolClient(lambda: address)

    def _obey(self, request: Any, context: grpc.ServicerContext) -> pb.PoolState:
        self.calls.append(request)
        if self.refusal is not None:
            context.abort(*self.refusal)
        return self.state


@contextmanager
def fake_controller() -> Iterator[FakeController]:
    """A controller that serves on a free port of the loopback interface until the block ends."""
    controller, trust = FakeController(), Trust(TOKEN)
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool, interceptors=[trust.interceptor()])
        add_ControllerServicer_to_server(controller, server)
        controller.port = trust.add_port(server, "127.0.0.1:0")
        server.start()
        try:
            yield controller
        finally:
            server.stop(None).wait()
