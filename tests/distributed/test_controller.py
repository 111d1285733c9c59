"""The controller's gRPC service at work on workers that are gRPC servers of this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from barista.errors import ConfigError
from barista.placement import ExpertKey
from barista.trust import Trust
from barista.v1 import controller_pb2 as pb
from barista.v1 import experts_pb2
from barista.v1.controller_pb2_grpc import ControllerStub
from barista.v1.experts_pb2_grpc import ExpertsServicer, add_ExpertsServicer_to_server
from experts.controller.calls import failure
from experts.controller.runner import Location, Runner
from experts.controller.service import serve
from experts.controller.state import Pool, PoolSettings
from experts.health.verdict import HEALTHY, Condition, Verdict
from experts.health.wire import health_message

TRUST = Trust("a token")
SIZE = 100
LAYERS = {0: 4, 2: 4}
TIMEOUT = 10.0


class FakeExperts(ExpertsServicer):
    """Holds digests instead of weights."""

    def __init__(self, name: str, incarnation: int, capacity: int, row: bytes, refusal: str, stalls: bool) -> None:
        self.name = name
        self.incarnation = f"{name} {incarnation}"
        self.capacity = capacity
        self.held: set[ExpertKey] = set()
        self.draining = False
        self.fence = (0, 0)
        self.row = row
        self.refusal = refusal
        self.stalls = stalls
        self.health: experts_pb2.Health | None = None

    async def Describe(self, request: Any, context: Any) -> experts_pb2.DescribeReply:
        return experts_pb2.DescribeReply(
            protocol_version=1,
            name=self.name,
            pid=1,
            incarnation=self.incarnation,
            numerics_id="avx2",
            model_digest=b"model",
            capacity_bytes=self.capacity,
            held_bytes=SIZE * len(self.held),
            draining=self.draining,
            term=self.fence[0],
            epoch=self.fence[1],
            held=[self._held(key) for key in sorted(self.held)],
            health=self.health,
        )

    async def Assign(self, request: Any, context: Any) -> AsyncIterator[experts_pb2.AssignProgress]:
        if self.refusal:
            await context.abort(grpc.StatusCode.DATA_LOSS, self.refusal)
        if self.stalls:
            await asyncio.Event().wait()
        self.fence = (request.term, request.epoch)
        for layer in request.experts:
            keys = [(layer.layer, expert) for expert in layer.experts]
            self.held |= set(keys)
            yield experts_pb2.AssignProgress(loaded=[self._held(key) for key in keys])

    async def Release(self, request: Any, context: Any) -> experts_pb2.ReleaseReply:
        self.held -= {(layer.layer, expert) for layer in request.experts for expert in layer.experts}
        return experts_pb2.ReleaseReply()

    async def Probe(self, request: Any, context: Any) -> experts_pb2.ProbeReply:
        return experts_pb2.ProbeReply(row=self.row)

    async def Drain(self, request: Any, context: Any) -> experts_pb2.DrainReply:
        self.draining = request.draining
        return experts_pb2.DrainReply()

    def _held(self, key: ExpertKey) -> experts_pb2.HeldExpert:
        return experts_pb2.HeldExpert(layer=key[0], expert=key[1], digest=b"%d %d" % key)


@dataclass
class FakeWorkers:
    """Starts one server for each worker, and another one in place of one that was killed."""

    capacity: int = 8 * SIZE
    room: int = 4
    row: bytes = b"row"
    refusal: str = ""
    stalls: bool = False
    trust: Trust = TRUST
    bugs: list[str] = field(default_factory=list)
    experts: dict[str, FakeExperts] = field(default_factory=dict)
    servers: dict[str, tuple[grpc.aio.Server, str]] = field(default_factory=dict)
    lives: dict[str, int] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)

    async def start(self, names: list[str]) -> None:
        if len(self.lives) + len(names) > self.room:
            raise ConfigError(f"Only {self.room} workers can be placed.", "Offer more places.")
        self.lives.update(dict.fromkeys(names, 0))

    async def locate(self, name: str, capacity_bytes: int) -> Location:
        self._fail("locate")
        while name not in self.lives:
            await asyncio.sleep(0.01)
        if name not in self.servers:
            self.lives[name] += 1
            self.experts[name] = FakeExperts(name, self.lives[name], self.capacity, self.row, self.refusal, self.stalls)
            server = grpc.aio.server(interceptors=[self.trust.aio_interceptor()])
            add_ExpertsServicer_to_server(self.experts[name], server)
            port = TRUST.add_port(server, "127.0.0.1:0")
            await server.start()
            self.servers[name] = (server, f"127.0.0.1:{port}")
        return Location(self.servers[name][1], "node")

    async def restart(self, name: str) -> None:
        await self.kill(name)

    async def move(self, name: str) -> None:
        self.moved.append(name)
        await self.kill(name)

    async def stop(self, name: str) -> None:
        self._fail("stop")
        self.lives.pop(name, None)
        await self.kill(name)

    def _fail(self, where: str) -> None:
        if where in self.bugs:
            self.bugs.remove(where)
            raise RuntimeError(where)

    async def kill(self, name: str) -> None:
        if name in self.servers:
            server, _ = self.servers.pop(name)
            await server.stop(None)


class Harness:
    """A pool that is running, and the ends of its wire."""

    def __init__(self, workers: FakeWorkers, redundancy: int) -> None:
        settings = PoolSettings(
            name=None,
            model_digest=b"model",
            layers=LAYERS,
            expert_bytes=dict.fromkeys(LAYERS, SIZE),
            redundancy=redundancy,
        )
        self.workers = workers
        self.pool = Pool(settings)
        self.runner = Runner(self.pool, workers, TRUST, b"probe", stall_seconds=0.2)
        self.address = ""
        self.stub: Any = None

    async def until(self, condition: Callable[[pb.PoolState], bool]) -> pb.PoolState:
        """The first state that satisfies it, as an onlooker is told."""
        async with asyncio.timeout(TIMEOUT):
            async for state in self.stub.Watch(_nothing(), metadata=TRUST.metadata):
                if condition(state):
                    return state
        raise AssertionError("the stream ended")

    async def ready(self) -> pb.PoolState:
        """Every worker holds all that it shall hold, and the first placement is complete."""
        state = await self.until(lambda state: all(worker.state == pb.WORKER_STATE_READY for worker in state.workers))
        while not self.pool.settled:
            await self.runner.changed(self.pool.revision, seconds=0.05)
        return state

    async def state(self) -> pb.PoolState:
        return await self.stub.GetState(pb.GetStateRequest(), metadata=TRUST.metadata)


async def _nothing() -> AsyncIterator[pb.WatchRequest]:
    await asyncio.Event().wait()
    yield pb.WatchRequest()


@contextlib.asynccontextmanager
async def pool_of(count: int, *, redundancy: int = 2, **changes: Any) -> AsyncIterator[Harness]:
    workers = FakeWorkers(**changes)
    harness = Harness(workers, redundancy)
    await workers.start(harness.pool.add(count, harness.runner.clock()))
    running = asyncio.create_task(harness.runner.run())
    server, port = await serve(harness.runner, TRUST, "127.0.0.1:0")
    harness.address = f"127.0.0.1:{port}"
    try:
        async with TRUST.aio_channel(harness.address) as channel:
            harness.stub = ControllerStub(channel)
            yield harness
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await server.stop(None)
        for name in list(workers.servers):
            await workers.kill(name)


def holders(state: pb.PoolState) -> set[str]:
    return {worker for layer in state.layers for expert in layer.experts for worker in expert.workers}


def run(test: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(4 * TIMEOUT):
            await test

    asyncio.run(limited())


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


def test_every_expert_is_loaded_and_the_watcher_sees_each_change_once() -> None:
    async def scenario() -> None:
        async with pool_of(2) as pool:
            seen = []
            async with asyncio.timeout(TIMEOUT):
                async for state in pool.stub.Watch(_nothing(), metadata=TRUST.metadata):
                    seen.append(state.epoch)
                    if all(worker.state == pb.WORKER_STATE_READY for worker in state.workers):
                        break
            assert seen == sorted(seen)
            assert (state.coverage, state.experts_uncovered, state.problem, state.term) == (1.0, 0, "", 1)
            assert [worker.name for worker in state.workers] == ["worker-0", "worker-1"]
            assert all(worker.address and worker.incarnation for worker in state.workers)
            assert all(len(expert.workers) == 2 for layer in state.layers for expert in layer.experts)
            assert state.layers[1].experts[3].digest == b"2 3"

    run(scenario())


def test_a_killed_worker_is_lost_then_back_with_its_experts() -> None:
    async def scenario() -> None:
        async with pool_of(2) as pool:
            before = await pool.ready()
            await pool.workers.kill("worker-0")
            await pool.until(lambda state: state.workers[0].state == pb.WORKER_STATE_LOST)
            after = await pool.ready()
            assert after.workers[0].restarts == 1
            assert after.workers[0].incarnation != before.workers[0].incarnation
            assert after.epoch > before.epoch
            assert pool.workers.experts["worker-0"].held == pool.workers.experts["worker-1"].held

    run(scenario())


def test_drain_scale_and_rebalance_return_when_they_are_done() -> None:
    async def scenario() -> None:
        async with pool_of(2) as pool:
            await pool.ready()
            state = await pool.stub.Scale(pb.ScaleRequest(workers=3), metadata=TRUST.metadata)
            assert [worker.state for worker in state.workers] == [pb.WORKER_STATE_READY] * 3
            assert pool.workers.experts["worker-2"].held
            state = await pool.stub.Drain(pb.DrainWorkerRequest(worker="worker-1"), metadata=TRUST.metadata)
            assert state.workers[1].state == pb.WORKER_STATE_DRAINED
            assert not pool.workers.experts["worker-1"].held
            reply = await pool.stub.Rebalance(pb.RebalanceRequest(dry_run=True), metadata=TRUST.metadata)
            assert (reply.imbalance_before, reply.state.coverage) == (pytest.approx(reply.imbalance_after), 1.0)
            state = await pool.stub.Scale(pb.ScaleRequest(workers=1), metadata=TRUST.metadata)
            assert [worker.name for worker in state.workers] == ["worker-0"]
            assert list(pool.workers.servers) == ["worker-0"]
            assert state.coverage == 1

    run(scenario())


def test_a_worker_whose_gpu_fails_is_drained_and_moved_and_serves_again() -> None:
    async def scenario() -> None:
        async with pool_of(2, redundancy=1) as pool:
            await pool.ready()
            broken = Verdict(Condition.FATAL, 0.0, "GPU 0: XID 79.")
            pool.workers.experts["worker-0"].health = health_message(broken, [experts_pb2.Gpu(index=0)])
            told = await pool.until(lambda state: state.workers[0].detail != "")
            assert told.workers[0].detail == "GPU 0: XID 79."
            after = await pool.until(lambda state: state.workers[0].restarts == 1)
            assert after.coverage == 1
            assert pool.workers.moved == ["worker-0"]
            assert (await pool.ready()).workers[0].detail == ""

    run(scenario())


def test_who_asks_gets_the_newest_reading() -> None:
    async def scenario() -> None:
        async with pool_of(1, redundancy=1) as pool:
            await pool.ready()
            for degrees in (50, 60):
                gpu = experts_pb2.Gpu(temperature_celsius=degrees)
                pool.workers.experts["worker-0"].health = health_message(HEALTHY, [gpu])
                readings = pool.pool.readings
                async with asyncio.timeout(TIMEOUT):
                    while pool.pool.readings == readings:
                        await asyncio.sleep(0.01)
                assert (await pool.state()).workers[0].health.gpus[0].temperature_celsius == degrees

    run(scenario())


def test_refusals_have_a_status_and_a_remedy_and_service_goes_on() -> None:
    async def scenario() -> None:
        async with pool_of(2, capacity=5 * SIZE, room=2) as pool:
            await pool.ready()
            drain = pool.stub.Drain(pb.DrainWorkerRequest(worker="worker-1"), metadata=TRUST.metadata)
            code, text = await refused(drain)
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert "300 bytes" in text
            code, text = await refused(pool.stub.Drain(pb.DrainWorkerRequest(worker="x"), metadata=TRUST.metadata))
            assert code is grpc.StatusCode.NOT_FOUND
            assert "worker-0, worker-1" in text
            code, text = await refused(pool.stub.Scale(pb.ScaleRequest(workers=3), metadata=TRUST.metadata))
            assert (code, text) == (
                grpc.StatusCode.FAILED_PRECONDITION,
                "Only 2 workers can be placed. Offer more places.",
            )
            code, _ = await refused(pool.stub.GetState(pb.GetStateRequest()))
            assert code is grpc.StatusCode.UNAUTHENTICATED
            state = await pool.state()
            assert (len(state.workers), state.coverage) == (2, 1.0)

    run(scenario())


def test_an_engines_stream_counts_acknowledges_and_reports_load() -> None:
    async def scenario() -> None:
        async with pool_of(2, redundancy=1) as pool:
            epoch = (await pool.ready()).epoch
            requests: asyncio.Queue[pb.WatchRequest] = asyncio.Queue()

            async def said() -> AsyncIterator[pb.WatchRequest]:
                while True:
                    yield await requests.get()

            load = pb.LayerLoad(layer=2, tokens=[0, 7, 0, 0])
            requests.put_nowait(pb.WatchRequest(engine_id="e", term=1, acknowledged_epoch=epoch, loads=[load]))
            stream = pool.stub.Watch(said(), metadata=TRUST.metadata)
            await stream.read()
            await pool.until(lambda state: state.engines == 1)
            assert pool.pool.load[2, 1] == 7
            drain = asyncio.create_task(
                _await(pool.stub.Drain(pb.DrainWorkerRequest(worker="worker-0"), metadata=TRUST.metadata))
            )
            flipped = await pool.until(lambda state: holders(state) == {"worker-1"})
            assert pool.workers.experts["worker-0"].held
            assert not drain.done()
            requests.put_nowait(pb.WatchRequest(engine_id="e", term=1, acknowledged_epoch=flipped.epoch))
            await drain
            assert not pool.workers.experts["worker-0"].held
            stream.cancel()
            await pool.until(lambda state: state.engines == 0)

    run(scenario())


def test_a_worker_whose_rows_differ_is_refused() -> None:
    async def scenario() -> None:
        async with pool_of(2) as pool:
            await pool.ready()
            pool.workers.row = b"another row"
            await pool.workers.kill("worker-1")
            state = await pool.until(lambda state: state.workers[1].state == pb.WORKER_STATE_REFUSED)
            assert "differs" in state.workers[1].detail
            assert holders(state) == {"worker-0"}

    run(scenario())


def test_what_a_checkpoint_lacks_is_told_as_the_problem() -> None:
    async def scenario() -> None:
        async with pool_of(1, refusal="Shard 2 is missing.") as pool:
            state = await pool.until(lambda state: "Shard 2" in state.problem)
            assert (state.coverage, state.experts_uncovered) == (0.0, 8)
            pool.workers.experts["worker-0"].refusal = ""
            assert (await pool.ready()).problem == ""

    run(scenario())


def test_a_worker_that_loads_nothing_for_too_long_is_told_as_the_problem_and_asked_again() -> None:
    async def scenario() -> None:
        async with pool_of(1, stalls=True) as pool:
            state = await pool.until(lambda state: "loaded nothing" in state.problem)
            assert "Check the disk" in state.problem
            pool.workers.experts["worker-0"].stalls = False
            assert (await pool.ready()).problem == ""

    run(scenario())


def test_a_worker_of_another_pool_is_named() -> None:
    async def scenario() -> None:
        async with pool_of(1, trust=Trust("another token")) as pool:
            state = await pool.until(lambda state: "token" in state.problem)
            assert state.workers[0].address in state.problem
            await pool.workers.kill("worker-0")
            pool.workers.trust = TRUST
            assert (await pool.ready()).problem == ""

    run(scenario())


def test_a_bug_in_one_step_stops_neither_the_following_of_a_worker_nor_the_actions() -> None:
    async def scenario() -> None:
        async with pool_of(2, bugs=["locate", "stop"]) as pool:
            await pool.ready()
            state = await pool.stub.Scale(pb.ScaleRequest(workers=1), metadata=TRUST.metadata)
            assert [worker.name for worker in state.workers] == ["worker-0"]
            assert pool.workers.bugs == []

    run(scenario())


def test_a_failed_handshake_is_told_with_what_the_certificates_need() -> None:
    details = "failed to connect to all addresses; last error: Ssl handshake failed: CERTIFICATE_VERIFY_FAILED"
    metadata = grpc.aio.Metadata()
    failed = failure("h:1", grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, metadata, metadata, details))
    assert failed.gone
    assert "--tls-dir" in str(failed)
    refused = failure("h:1", grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, metadata, metadata, "refused"))
    assert "--tls-dir" not in str(refused)


async def _await(call: Any) -> Any:
    return await call
