"""A TCP proxy that ill-treats what passes through it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any


class ChaosProxy:
    """Carries bytes between whoever connects to `address` and `target`, host:port, in a thread of its own.

    delay: seconds that each piece of data waits. refusing: new connections are closed at once. Both, and `target`,
    may be changed at any time, from any thread.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.delay = 0.0
        self.refusing = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos proxy", daemon=True)
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._connection, "127.0.0.1", 0))
        host, port = self._server.sockets[0].getsockname()
        self.address = f"{host}:{port}"

    def cut(self) -> None:
        """Reset every connection."""
        self._do(self._abort())

    @contextmanager
    def away(self) -> Iterator[None]:
        """For the length of the `with` nobody is there: connections are reset, and new ones are not served."""
        self.refusing = True
        self.cut()
        try:
            yield
        finally:
            self.refusing = False

    @contextmanager
    def blackhole(self) -> Iterator[None]:
        """For the length of the `with` nothing arrives, and nobody is told."""
        self._loop.call_soon_threadsafe(self._flowing.clear)
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self._flowing.set)

    def half_close(self) -> None:
        """End what goes towards the clients; what they send still arrives."""
        self._do(self._end_answers())

    def close(self) -> None:
        """End all connections, and the thread."""
        self._do(self._shut_down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.client_side = True  # type: ignore[attr-defined]
        self._writers.add(writer)
        with contextlib.suppress(OSError):
            if not self.refusing:
                host, port = self.target.rsplit(":", 1)
                target_reader, target_writer = await asyncio.open_connection(host, int(port))
                self._writers.add(target_writer)
                await asyncio.gather(self._carry(reader, target_writer), self._carry(target_reader, writer))
                self._discard(target_writer)
        self._discard(writer)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if self.delay:
                    await asyncio.sleep(self.delay)
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
        if writer.can_write_eof() and not writer.transport.is_closing():
            with contextlib.suppress(OSError):
                writer.write_eof()

    def _discard(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.transport.abort()

    async def _abort(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _end_answers(self) -> None:
        for writer in self._writers:
            if getattr(writer, "client_side", False):
                writer.write_eof()

    async def _shut_down(self) -> None:
        self._server.close()
        self._flowing.set()
        await self._abort()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), 5)


@contextmanager
def proxy_to(target: str) -> Iterator[ChaosProxy]:
    """A proxy that is gone at the end."""
    proxy = ChaosProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
