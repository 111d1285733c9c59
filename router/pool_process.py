"""The pool's keeper as a child process: it starts the workers with Ray, or joins those that are there.

Protocol: JSON objects, one a line, over a socket pair. The order goes first; progress, ready or fatal come back. The
end of the stream, however this process ends, tells the keeper to take down a pool that has no name.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from barista.errors import BaristaError
from experts.cluster.messages import PoolConfig
from router.messages import PoolAddress
from router.pool_client import PoolClient

log = logging.getLogger(__name__)

KEEPER = (sys.executable, "-m", "experts.cluster")
CLOSE_SECONDS = 20.0  # the keeper gives a pool 10 s to end, and what Ray leaves behind another 5


class PoolProcess:
    """Starts the keeper and tells where its controller serves.

    order: what pool to make (router.pool_order). transport: of the engine's wires to the workers. outlives_keeper: the
    workers go on without their keeper, because the pool has a name or the Ray cluster is not the keeper's own. client:
    of the pool's controller. died: set once the keeper has gone.
    """

    def __init__(
        self,
        order: PoolConfig,
        *,
        transport: str,
        outlives_keeper: bool,
        command: Sequence[str] = KEEPER,
    ) -> None:
        self._order = order
        self._transport = transport
        self.outlives_keeper = outlives_keeper
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._listener: asyncio.Task[None] | None = None
        self._fatal: BaristaError | None = None
        self._address: PoolAddress | None = None
        self.client = PoolClient(lambda: self._address)
        self.died = asyncio.Event()

    async def start(self, on_progress: Callable[[float, str], None] = lambda fraction, message: None) -> PoolAddress:
        """Where the pool's controller serves; its workers may still be loading.

        on_progress: called until close, since workers load after this returns. Raises BaristaError with the keeper's
        own words if there can be no pool.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            # In a session of its own, so that Ctrl-C in a terminal ends open streams before their workers.
            self._process = subprocess.Popen(
                [*self._command, str(theirs.fileno())], pass_fds=[theirs.fileno()], start_new_session=True
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._writer.write(self._order.to_json().encode() + b"\n")
        events = _events(reader)
        async for event in events:
            match event["event"]:
                case "progress":
                    on_progress(event["fraction"], event["message"])
                case "ready":
                    self._address = PoolAddress(
                        controller=event["controller"],
                        token=event["token"],
                        tls_dir=self._order.tls_dir,
                        transport=self._transport,
                    )
                    self._listener = asyncio.create_task(self._listen(events, on_progress))
                    return self._address
                case "fatal":
                    raise _fatal(event)
        code = await asyncio.to_thread(self._process.wait)
        raise BaristaError(
            f"The pool's keeper ended with exit code {code} before there was a pool.", "The lines above may say why."
        )

    @property
    def failure(self) -> BaristaError:
        """Why the keeper went, for who cannot go on without it."""
        return self._fatal or BaristaError(
            "The pool's keeper died, and its workers with it; the lines above may say why.", "Start the server again."
        )

    async def close(self) -> None:
        """Tell the keeper to end and wait until it has; kill what does not go by itself."""
        await self.client.close()
        if self._writer is not None:
            self._writer.close()
        if self._process is None:
            return
        try:
            await asyncio.to_thread(self._process.wait, CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("The pool's keeper does not end; killing it. Ray processes may be left: see `ray stop`.")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await asyncio.to_thread(self._process.wait)
        if self._listener is not None:
            self._listener.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._listener

    async def _listen(self, events: AsyncIterator[Any], on_progress: Callable[[float, str], None]) -> None:
        try:
            async for event in events:
                match event["event"]:
                    case "progress":
                        on_progress(event["fraction"], event["message"])
                    case "fatal":
                        self._fatal = _fatal(event)
                        log.error("The pool's keeper: %s", self._fatal)
        finally:
            self.died.set()


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[Any]:
    """The keeper's lines, to the end of the stream."""
    with contextlib.suppress(ConnectionError):
        while line := await reader.readline():
            yield json.loads(line)


def _fatal(event: Mapping[str, str]) -> BaristaError:
    return BaristaError(event["message"], event.get("remedy", ""))
