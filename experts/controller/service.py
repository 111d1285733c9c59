"""barista.v1.Controller: the pool for routers, which watch it, and for operators, who command it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from barista.errors import BaristaError
from barista.trust import SERVER_OPTIONS, Trust
from barista.v1 import controller_pb2 as pb
from barista.v1.controller_pb2_grpc import ControllerServicer, add_ControllerServicer_to_server
from experts.controller.commands import Command, Refused, begin_drain, begin_drain_node, begin_rebalance, begin_scale
from experts.controller.runner import Runner
from experts.controller.wire import move, pool_state

SEND_INTERVAL = 0.02  # seconds between two states on one stream: changes in between are one


async def serve(runner: Runner, trust: Trust, address: str) -> tuple[grpc.aio.Server, int]:
    """A server that is running, and its port. Raises ConfigError when it cannot listen at `address`."""
    server = grpc.aio.server(interceptors=[trust.aio_interceptor()], options=SERVER_OPTIONS)
    add_ControllerServicer_to_server(ControllerService(runner), server)
    port = trust.add_port(server, address)
    await server.start()
    return server, port


class ControllerService(ControllerServicer):  # type: ignore[misc]  # generated without types
    """One command at a time; the others wait."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._pool = runner.pool
        self._command = asyncio.Lock()
        self._streams = itertools.count()
        self._cached: tuple[tuple[int, int], pb.PoolState] = ((-1, -1), pb.PoolState())

    async def Watch(self, requests: AsyncIterator[pb.WatchRequest], context: Any) -> AsyncIterator[pb.PoolState]:
        listener = asyncio.create_task(self._listen(requests, next(self._streams)))
        try:
            while self._pool.recovering:
                await self._runner.changed(self._pool.revision)
            while True:
                state = self._state()
                revision = self._pool.revision
                yield state
                await asyncio.sleep(SEND_INTERVAL)
                await self._runner.changed(revision)
        finally:
            listener.cancel()

    async def GetState(self, request: pb.GetStateRequest, context: Any) -> pb.PoolState:
        return self._state()

    async def Drain(self, request: pb.DrainWorkerRequest, context: Any) -> pb.PoolState:
        def begin() -> Command:
            now = self._runner.clock()
            if request.node:
                return begin_drain_node(self._pool, request.node, now)
            return begin_drain(self._pool, request.worker, now)

        await self._run(begin, context)
        return self._state()

    async def Scale(self, request: pb.ScaleRequest, context: Any) -> pb.PoolState:
        await self._run(lambda: begin_scale(self._pool, request.workers, self._runner.clock()), context)
        return self._state()

    async def Rebalance(self, request: pb.RebalanceRequest, context: Any) -> pb.RebalanceReply:
        reply = pb.RebalanceReply()

        def begin() -> Command:
            now = self._runner.clock()
            plan, moves, command = begin_rebalance(
                self._pool,
                request.move_budget,
                now,
                dry_run=request.dry_run,
                policy=request.policy or "incremental",
            )
            reply.imbalance_before, reply.imbalance_after = plan.imbalance_before, plan.imbalance_after
            reply.moves.extend(move(moved) for moved in moves)
            return command

        await self._run(begin, context)
        reply.state.CopyFrom(self._state())
        return reply

    async def _listen(self, requests: AsyncIterator[pb.WatchRequest], stream: int) -> None:
        """What an engine says. A stream that says nothing is an onlooker's, no engine's."""
        engine = ""
        try:
            async for request in requests:
                engine = f"{request.engine_id} {stream}"
                tokens = {
                    (load.layer, expert): count
                    for load in request.loads
                    for expert, count in enumerate(load.tokens)
                    if count
                }
                now = self._runner.clock()
                self._pool.engine_said(engine, request.term, request.acknowledged_epoch, tokens, now)
                self._runner.wake()
            await asyncio.Event().wait()
        finally:
            self._pool.engine_gone(engine)
            self._runner.wake()

    async def _run(self, begin: Callable[[], Command], context: Any) -> None:
        try:
            async with self._command:
                command = begin()
                if command.started:
                    await self._start(command.started)
                while not command.is_over(self._runner.clock()):
                    revision = self._pool.revision
                    self._runner.wake()
                    await self._runner.changed(revision, seconds=0.2)
        except Refused as refusal:
            code = grpc.StatusCode.NOT_FOUND if refusal.unknown else grpc.StatusCode.FAILED_PRECONDITION
            await context.abort(code, str(refusal))
        except BaristaError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    async def _start(self, names: list[str]) -> None:
        try:
            await self._runner.workers.start(names)
        except BaristaError:
            for name in names:
                await self._runner.forget(name)
            raise

    def _state(self) -> pb.PoolState:
        as_of = self._pool.revision, self._pool.readings
        if self._cached[0] != as_of:
            self._cached = as_of, pool_state(self._pool)
        return self._cached[1]
