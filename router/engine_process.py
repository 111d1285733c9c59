"""The engine as a child process, seen from the API: an EngineClient over a socket pair."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable

import msgspec

from barista.errors import BaristaError, EngineFailed
from router.engine_session import ENGINE_DEAD, EngineSession, dead
from router.framing import frame, read_frame_async
from router.messages import (
    Command,
    EngineConfig,
    Failed,
    Fatal,
    Loading,
    ModelInfo,
    PoolAddress,
    Ready,
    Stats,
    Submit,
    Token,
    decode_event,
    encode,
)

CLOSE_SECONDS = 5.0
# Of silence. The controller, the workers and the disk have their say within a step, but not for so long.
PROGRESS_SECONDS = 300.0


class EngineChild:
    """An engine's process that has not been told yet what to load: it is importing what it needs meanwhile.

    It is spawned with its end of a socket pair as its only inherited descriptor. When this process goes, in whatever
    way, it reads end-of-file and exits.
    """

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "router.engine", str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )

    def close(self) -> None:
        """Kill it if it still runs."""
        self.socket.close()
        self.process.kill()
        self.process.wait()


class EngineProcess:
    """Starts the engine, routes its events to the open requests, and ends them all when it dies.

    child: its process, if it runs already.
    """

    def __init__(self, config: EngineConfig, child: EngineChild | None = None) -> None:
        self._config = config
        self._child = child
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._router: asyncio.Task[None] | None = None
        self._model: ModelInfo | None = None
        self._session = EngineSession(self._send)
        self.died = self._session.ended

    async def start(
        self,
        on_progress: Callable[[float, str], None] = lambda fraction, message: None,
        pool: PoolAddress | None = None,
    ) -> None:
        """Load the model, without its experts if they are in a pool. Raises BaristaError with the engine's message."""
        child = self._child or EngineChild()
        self._process = child.process
        reader, self._writer = await asyncio.open_connection(sock=child.socket)
        self._writer.write(frame(encode(msgspec.structs.replace(self._config, pool=pool))))
        while True:
            payload = await read_frame_async(reader)
            if payload is None:
                code = await asyncio.to_thread(self._process.wait)
                raise BaristaError(f"The engine ended with exit code {code} while loading {self._config.path}.")
            event = decode_event(payload)
            if isinstance(event, Loading):
                on_progress(event.fraction, event.message)
            elif isinstance(event, Fatal):
                await asyncio.to_thread(self._process.wait)
                raise BaristaError(event.message, event.remedy)
            elif isinstance(event, Ready):
                self._model = event.model
                self._router = asyncio.create_task(self._route(reader))
                return

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        assert self._process is not None
        return self._process.pid

    @property
    def ready(self) -> bool:
        """True while the engine serves."""
        return self._model is not None and not self.died.is_set()

    @property
    def model(self) -> ModelInfo:
        """The loaded model. Raises EngineFailed before the start."""
        if self._model is None:
            raise EngineFailed("The model is still loading.", status=503, code="loading", retry_after=1)
        return self._model

    def submit(self, request: Submit) -> AsyncIterator[Token | Failed]:
        """As EngineClient.submit."""
        if not self.ready:
            return _refused(request.request_id)
        return self._session.submit(request)

    async def stats(self) -> Stats:
        """As EngineClient.stats."""
        if not self.ready:
            raise EngineFailed("The engine is not running.", status=503, code=ENGINE_DEAD)
        return await self._session.stats()

    async def makes_progress(self) -> bool:
        """As EngineClient.makes_progress: a step may take long, but not PROGRESS_SECONDS."""
        if not self.ready:
            return True
        with contextlib.suppress(EngineFailed):
            await self.stats()  # whose answer, however late, is an event
        return time.monotonic() - self._session.last_event < PROGRESS_SECONDS

    async def close(self) -> None:
        """End the engine; kill it if it does not go by itself. Every open request gets its Failed event."""
        was_ready = self.ready
        if self._writer is not None:
            self._writer.close()
        if self._router is not None:
            await self._router
        if self._process is None:
            return
        if not was_ready:
            self._process.kill()  # it may be deep in loading and hear nothing
        try:
            await asyncio.to_thread(self._process.wait, CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    def _send(self, command: Command) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame(encode(command)))

    async def _route(self, reader: asyncio.StreamReader) -> None:
        try:
            while (payload := await read_frame_async(reader)) is not None:
                self._session.take(decode_event(payload))
        finally:
            self._session.end()


async def _refused(request_id: str) -> AsyncIterator[Token | Failed]:
    yield dead(request_id)
