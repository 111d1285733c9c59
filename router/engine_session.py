"""The open requests of one connection to an engine, whatever carries its frames: who waits for which event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable

from barista.errors import EngineFailed
from router.messages import Abort, Command, Event, Failed, GetStats, Stats, StepEvents, Submit, Token

STATS_SECONDS = 2.0
ENGINE_DEAD = "engine_dead"


class EngineSession:
    """Give `take` every event that arrives, and call `end` when no more will.

    send: sends a command. It is not called after `end`, and may drop what nobody can receive any more.
    """

    def __init__(self, send: Callable[[Command], None]) -> None:
        self._send = send
        self._open: dict[str, asyncio.Queue[Token | Failed]] = {}
        self._stats: list[asyncio.Future[Stats]] = []
        self.ended = asyncio.Event()
        self.last_event = time.monotonic()

    @property
    def num_open(self) -> int:
        """Requests that are not answered yet."""
        return len(self._open)

    async def submit(self, request: Submit) -> AsyncGenerator[Token | Failed]:
        """As EngineClient.submit."""
        if self.ended.is_set():
            yield dead(request.request_id)
            return
        events: asyncio.Queue[Token | Failed] = asyncio.Queue()
        self._open[request.request_id] = events
        self._send(request)
        finished = False
        try:
            while not finished:
                event = await events.get()
                finished = isinstance(event, Failed) or event.finish_reason is not None
                yield event
        finally:
            del self._open[request.request_id]
            if not finished and not self.ended.is_set():
                self._send(Abort((request.request_id,)))

    async def stats(self) -> Stats:
        """As EngineClient.stats."""
        if self.ended.is_set():
            raise EngineFailed("The engine is not running.", status=503, code=ENGINE_DEAD)
        answer: asyncio.Future[Stats] = asyncio.get_running_loop().create_future()
        self._stats.append(answer)
        self._send(GetStats())
        try:
            return await asyncio.wait_for(answer, STATS_SECONDS)
        except TimeoutError:
            message = f"The engine has not answered for {STATS_SECONDS} s; it may be in a long step."
            raise EngineFailed(message, status=503, code="engine_busy") from None

    def take(self, event: Event) -> None:
        """What the engine said. Events of requests that nobody waits for any more are dropped."""
        self.last_event = time.monotonic()
        if isinstance(event, StepEvents):
            items: tuple[Token | Failed, ...] = (*event.tokens, *event.failed)
            for item in items:
                if (queue := self._open.get(item.request_id)) is not None:
                    queue.put_nowait(item)
        elif isinstance(event, Stats) and self._stats:
            answer = self._stats.pop(0)
            if not answer.done():
                answer.set_result(event)

    def end(self) -> None:
        """The engine has gone, or speaks what we do not understand: nobody may wait for it any more."""
        self.ended.set()
        for request_id, queue in self._open.items():
            queue.put_nowait(dead(request_id))
        for answer in self._stats:
            if not answer.done():
                answer.set_exception(EngineFailed("The engine died.", status=503, code=ENGINE_DEAD))
        self._stats.clear()


def dead(request_id: str) -> Failed:
    """The end of a request whose engine has gone."""
    return Failed(request_id, ENGINE_DEAD, "The engine died; the answer cannot be finished.")
