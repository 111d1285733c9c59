"""barista.v1.Engine: one engine for the APIs of other hosts, which attach, ask and may go at any time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, cast

import grpc
import msgspec
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_health.v1.health_pb2 import HealthCheckResponse

from barista.errors import EngineFailed
from barista.trust import SERVER_OPTIONS, Trust
from barista.v1 import engine_pb2 as pb
from barista.v1.engine_pb2_grpc import EngineServicer, add_EngineServicer_to_server
from router.engine_client import EngineClient
from router.messages import (
    Abort,
    Command,
    Failed,
    GetStats,
    Greeting,
    Stats,
    StepEvents,
    Submit,
    Token,
    decode_command,
    encode,
)

log = logging.getLogger(__name__)

SERVICE = "barista.v1.Engine"
ENGINE_DRAINING = "engine_draining"
RETRY_SECONDS = 0.1


class EngineService(EngineServicer):  # type: ignore[misc]  # generated without types
    """greeting: called at each attachment, once the engine is ready."""

    def __init__(self, engine: EngineClient, greeting: Callable[[], Greeting]) -> None:
        self._engine = engine
        self._greeting = greeting
        self._attached: set[_Attachment] = set()
        self._count = 0
        self._draining = False
        self._health = health_aio.HealthServicer()

    async def serve(self, trust: Trust, address: str) -> tuple[grpc.aio.Server, int]:
        """A server that is running, and its port; not SERVING before `set_serving`. Raises ConfigError."""
        server = grpc.aio.server(interceptors=[trust.aio_interceptor()], options=SERVER_OPTIONS)
        add_EngineServicer_to_server(self, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        port = trust.add_port(server, address)
        await self._health.set(SERVICE, HealthCheckResponse.NOT_SERVING)
        await server.start()
        return server, port

    async def set_serving(self) -> None:
        """The model is loaded: APIs may attach."""
        await self._health.set(SERVICE, HealthCheckResponse.SERVING)

    async def drain(self, seconds: float) -> None:
        """Take no new request. Open ones have so long to finish; then their APIs are told to go on elsewhere."""
        self._draining = True
        await self._health.set(SERVICE, HealthCheckResponse.NOT_SERVING)
        finished = [attachment.wait_idle() for attachment in self._attached]
        try:
            await asyncio.wait_for(asyncio.gather(*finished), seconds)
        except TimeoutError:
            for attachment in self._attached:
                attachment.hand_over()

    async def Attach(self, requests: AsyncIterator[pb.EngineFrame], context: Any) -> AsyncIterator[pb.EngineFrame]:
        if not self._engine.ready or self._draining:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "The engine is loading its model, or draining.")
        self._count += 1
        attachment = _Attachment(self._engine, self._count, is_draining=lambda: self._draining)
        self._attached.add(attachment)
        listener = asyncio.create_task(attachment.listen(requests))
        try:
            yield _frame(self._greeting())
            async for event in attachment.events():
                yield _frame(event)
        finally:
            self._attached.remove(attachment)
            listener.cancel()
            await attachment.close()


class _Attachment:
    """One API's requests. number: keeps their names apart from those of other APIs."""

    def __init__(self, engine: EngineClient, number: int, *, is_draining: Callable[[], bool]) -> None:
        self._engine = engine
        self._prefix = f"{number}/"
        self._is_draining = is_draining
        self._open: dict[str, asyncio.Task[None]] = {}
        self._asked: set[asyncio.Task[None]] = set()
        self._tokens: list[Token] = []
        self._failed: list[Failed] = []
        self._stats: list[Stats] = []
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._ended = False

    async def listen(self, requests: AsyncIterator[pb.EngineFrame]) -> None:
        """Do what the API asks for, until it has said its last."""
        try:
            async for frame in requests:
                self._apply(decode_command(frame.payload))
        except msgspec.MsgspecError:
            log.exception("An API has said what this engine does not understand.")
        finally:
            self._ended = True
            self._news.set()

    async def events(self) -> AsyncIterator[StepEvents | Stats]:
        """What there is to say: all that has come since the last event, in one."""
        while not self._ended:
            await self._news.wait()
            self._news.clear()
            tokens, self._tokens = tuple(self._tokens), []
            failed, self._failed = tuple(self._failed), []
            stats, self._stats = self._stats, []
            if tokens or failed:
                yield StepEvents(tokens, failed)
            for answer in stats:
                yield answer

    async def wait_idle(self) -> None:
        """Returns when no request is open."""
        await self._idle.wait()

    def hand_over(self) -> None:
        """End every request with the word that another engine is to go on with it."""
        for request_id, task in list(self._open.items()):
            task.cancel()
            self._fail(request_id)

    async def close(self) -> None:
        """Abort what is open."""
        tasks = [*self._open.values(), *self._asked]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _apply(self, command: Command) -> None:
        match command:
            case Submit():
                if self._is_draining():
                    self._fail(command.request_id)
                    return
                task = asyncio.create_task(self._run(command))
                self._open[command.request_id] = task
                self._idle.clear()
                task.add_done_callback(lambda _: self._closed(command.request_id))
            case Abort():
                for request_id in command.request_ids:
                    if request_id in self._open:
                        self._open[request_id].cancel()
            case GetStats():
                asking = asyncio.create_task(self._answer_stats())
                self._asked.add(asking)
                asking.add_done_callback(self._asked.discard)

    def _fail(self, request_id: str) -> None:
        self._failed.append(Failed(request_id, ENGINE_DRAINING, "The engine is going; another one can go on."))
        self._news.set()

    async def _run(self, submit: Submit) -> None:
        request_id = submit.request_id
        events = self._engine.submit(msgspec.structs.replace(submit, request_id=self._prefix + request_id))
        async with aclosing(cast("AsyncGenerator[Token | Failed]", events)) as iterator:
            async for event in iterator:
                self._say(msgspec.structs.replace(event, request_id=request_id))

    def _closed(self, request_id: str) -> None:
        del self._open[request_id]
        if not self._open:
            self._idle.set()

    def _say(self, event: Token | Failed) -> None:
        if isinstance(event, Token):
            self._tokens.append(event)
        else:
            self._failed.append(event)
        self._news.set()

    async def _answer_stats(self) -> None:
        """Each question gets its answer, however late: the API counts on their order."""
        while self._engine.ready:
            try:
                stats = await self._engine.stats()
            except EngineFailed:
                await asyncio.sleep(RETRY_SECONDS)
            else:
                self._stats.append(stats)
                self._news.set()
                return


def _frame(event: Greeting | StepEvents | Stats) -> pb.EngineFrame:
    return pb.EngineFrame(payload=encode(event))
