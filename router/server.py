"""The running server: the API, its engine and, where the experts are on workers, their pool; how each ending goes.

SIGINT ends at once: open streams get an error event, open gRPC calls an error status. SIGTERM drains: new requests are
refused, open streams finish, for at most drain_timeout. A second signal always ends at once. A dead engine, an HTTP
server that ends by itself, or the end of a pool that is the server's own, ends the server with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from barista.errors import BaristaError
from router.console import OnProgress, progress
from router.ending import Ending, first
from router.engine_client import StartableEngine
from router.grpc_api import GrpcApi
from router.messages import ModelInfo
from router.pool_process import PoolProcess

log = logging.getLogger(__name__)

# How long failed streams may take to deliver their last event, and clients to take it.
LAST_EVENTS_SECONDS = 2


class _Http(uvicorn.Server):
    """uvicorn without its signal handlers: what a signal means is decided here."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """An application (router.api.app), its engine and the pool of its experts.

    drain_timeout: seconds. grpc_port: of the same API over gRPC, 0 for a free one; None for none.
    """

    def __init__(
        self,
        app: FastAPI,
        engine: StartableEngine,
        pool: PoolProcess | None = None,
        *,
        drain_timeout: float,
        grpc_port: int | None = None,
    ) -> None:
        self._app = app
        self._engine = engine
        self._pool = pool
        self._grpc = None if grpc_port is None else GrpcApi(app.state.service, grpc_port)
        self._drain_timeout = drain_timeout
        self._http = _Http(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=LAST_EVENTS_SECONDS,
            )
        )

    @property
    def grpc_address(self) -> str:
        """Where gRPC's clients reach a running server from this machine, as host:port; empty if they cannot."""
        return "" if self._grpc is None else self._grpc.address

    async def run(self, sock: socket.socket, on_ready: Callable[[ModelInfo], None], *, until_eof: bool) -> int:
        """Serve on a listening socket until something ends it. Returns the exit status; raises BaristaError."""
        ending = Ending()
        ending.watch(until_eof=until_eof)
        if self._grpc is not None:
            await self._grpc.start(sock.getsockname()[0])
        http = asyncio.create_task(self._http.serve(sockets=[sock]))
        try:
            if await self._load(ending, http):
                on_ready(self._engine.model)
                await self._until_ended(ending, http)
        finally:
            await self._engine.close()
            self._http.should_exit = True
            if self._grpc is not None:
                await self._grpc.stop(LAST_EVENTS_SECONDS)
            await asyncio.wait((http,))
            if self._pool is not None:
                await self._pool.close()
        http.result()
        return 0

    async def _load(self, ending: Ending, http: asyncio.Task[None]) -> bool:
        """Start pool and engine; False if a signal came first. Raises BaristaError with the reason of who cannot."""
        with progress("Loading") as on_progress:
            loading = asyncio.create_task(self._start(on_progress))
            await first(loading, http, ending.now.wait(), ending.drain.wait())
            if not loading.done():
                loading.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await loading
                _require_running(http)
                return False
            await loading
            return True

    async def _start(self, on_progress: OnProgress) -> None:
        """The engine loads its trunk while the workers load their experts, and has started once it reaches them all."""
        if self._pool is None:
            await self._engine.start(on_progress)
            return
        address = await self._pool.start(on_progress)
        starting = asyncio.create_task(self._engine.start(on_progress, address))
        try:
            await first(starting, self._pool.died.wait())
            if not starting.done():
                raise self._pool.failure
            await starting
        finally:
            starting.cancel()

    async def _until_ended(self, ending: Ending, http: asyncio.Task[None]) -> None:
        await first(http, self._lost(), ending.now.wait(), ending.drain.wait())
        if ending.drain.is_set() and not ending.now.is_set():
            log.info("Draining: open streams have %g s to finish.", self._drain_timeout)
            self._app.state.drain()
            await first(self._app.state.wait_idle(), self._lost(), ending.now.wait(), timeout=self._drain_timeout)
        _require_running(http)
        if self._engine.died.is_set():
            raise BaristaError("The engine died; the lines above may say why.", "Start the server again.")
        if self._pool is not None and self._pool.died.is_set() and not self._pool.outlives_keeper:
            raise self._pool.failure

    async def _lost(self) -> None:
        """Return when what the server cannot do without has died: its engine, or a pool that ends with its keeper."""
        if self._pool is None:
            await self._engine.died.wait()
            return
        await first(self._engine.died.wait(), self._pool.died.wait())
        if self._pool.outlives_keeper and not self._engine.died.is_set():
            log.warning("The pool's keeper has died; its workers go on, and so does this server.")
            await self._engine.died.wait()


def _require_running(http: asyncio.Task[None]) -> None:
    """Raise BaristaError if the HTTP server has ended, which nobody asked it to."""
    if http.done():
        raise BaristaError(
            "The HTTP server ended by itself; the lines above may say why.", "Start the server again."
        ) from http.exception()
