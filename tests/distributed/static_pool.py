"""A pool without Ray: real worker processes, and a controller that says what a test tells it to say."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc

from barista.v1 import controller_pb2 as pb
from barista.v1 import controller_pb2_grpc as pb_grpc
from experts.attach import WorkerClient
from experts.expert_model import ExpertModel
from experts.numerics import numerics_id
from experts.remote import PoolConfig
from tests.distributed.workers import TRUST, RunningWorker, start_workers

# worker name -> layer -> the experts that it holds
Placement = Mapping[str, Mapping[int, Sequence[int]]]


class FakeController(pb_grpc.ControllerServicer):
    """Answers every Watch with the present state, and with each that follows."""

    def __init__(self) -> None:
        self._state = pb.PoolState()
        self._watchers: list[queue.SimpleQueue[pb.PoolState | None]] = []
        self.acknowledged: list[int] = []
        self.loads: dict[int, list[int]] = {}
        self._server = grpc.server(ThreadPoolExecutor(8))
        pb_grpc.add_ControllerServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def publish(self, state: pb.PoolState) -> None:
        self._state = state
        for watcher in self._watchers:
            watcher.put(state)

    def Watch(self, requests: Iterator[pb.WatchRequest], context: grpc.ServicerContext) -> Iterator[pb.PoolState]:
        mine: queue.SimpleQueue[pb.PoolState | None] = queue.SimpleQueue()
        mine.put(self._state)
        self._watchers.append(mine)
        context.add_callback(lambda: mine.put(None))
        ThreadPoolExecutor(1).submit(self._listen, requests)
        while (state := mine.get()) is not None:
            yield state

    def _listen(self, requests: Iterator[pb.WatchRequest]) -> None:
        try:
            for request in requests:
                self.acknowledged.append(request.acknowledged_epoch)
                for load in request.loads:
                    total = self.loads.setdefault(load.layer, [0] * len(load.tokens))
                    self.loads[load.layer] = [a + b for a, b in zip(total, load.tokens, strict=True)]
        except grpc.RpcError:
            pass  # the engine has gone

    def stop(self) -> None:
        for watcher in self._watchers:
            watcher.put(None)
        self._server.stop(0).wait()


@dataclass
class StaticPool:
    """workers: by name. state(): of a placement, in which only live workers are named."""

    model: ExpertModel
    controller: FakeController
    workers: dict[str, RunningWorker]
    epoch: int = 0
    placement: dict[str, dict[int, list[int]]] = field(default_factory=dict)

    def assign(self, placement: Placement) -> None:
        """Have the workers load these, and publish it as the next epoch."""
        for name, layers in placement.items():
            keys = [(layer, expert) for layer, experts in layers.items() for expert in experts]
            list(WorkerClient(self.workers[name].address, TRUST).assign(keys, term=1, epoch=self.epoch + 1))
        self.publish(placement)

    def publish(self, placement: Placement) -> None:
        """Say so as the next epoch, whatever the workers hold."""
        self.epoch += 1
        self.placement = {name: {k: list(v) for k, v in layers.items()} for name, layers in placement.items()}
        state = pb.PoolState(term=1, epoch=self.epoch, coverage=1.0, model_digest=self.model.digest)
        for name, worker in self.workers.items():
            state.workers.add(
                name=name,
                address=worker.address,
                pid=worker.pid,
                state=pb.WORKER_STATE_READY,
                incarnation=str(worker.pid),
            )
        for layer, spec in self.model.layers.items():
            message = state.layers.add(layer=layer)
            for expert in range(spec.num_experts):
                holders = [name for name, held in placement.items() if expert in held.get(layer, ())]
                message.experts.add(workers=holders)
        self.controller.publish(state)

    def config(self, dtype_name: str = "float32", *, transport: str = "auto", max_rows: int = 64) -> PoolConfig:
        """For load_model."""
        import torch

        return PoolConfig(
            controller=self.controller.address,
            trust=TRUST,
            transport=transport,
            numerics_id=numerics_id(getattr(torch, dtype_name), self.model.format),
            max_rows=max_rows,
        )


@contextmanager
def static_pool(model: ExpertModel, *names: str, **options: object) -> Iterator[StaticPool]:
    """Worker processes of these names that hold nothing yet, and their controller. options: as start_workers takes."""
    with start_workers(model, *names, **options) as workers:  # type: ignore[arg-type]
        controller = FakeController()
        try:
            yield StaticPool(model, controller, {worker.name: worker for worker in workers})
        finally:
            controller.stop()


def everything(model: ExpertModel, *names: str) -> Placement:
    """Each worker holds all experts."""
    return {name: {layer: list(range(spec.num_experts)) for layer, spec in model.layers.items()} for name in names}


def shared_out(model: ExpertModel, *names: str) -> Placement:
    """Each expert on one worker, in turn."""
    return {
        name: {
            layer: [e for e in range(spec.num_experts) if e % len(names) == i] for layer, spec in model.layers.items()
        }
        for i, name in enumerate(names)
    }
