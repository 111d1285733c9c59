"""Answers that notice when their client leaves, whole or as server-sent events (SSE, WHATWG HTML section 9.2).

ASGI tells of a lost client by a `http.disconnect` message and by nothing else, so it is awaited beside the work.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

from barista.errors import RequestError
from barista.metrics import Metrics
from router.api.errors import encode_json, engine_failed, error_event

DONE = b"data: [DONE]\n\n"
CLIENT_CLOSED_REQUEST = 499  # nginx's code; nobody receives it

T = TypeVar("T")

log = logging.getLogger(__name__)


class ClientDisconnected(Exception):
    """The client left before its answer was complete."""


def event(value: object) -> bytes:
    """One server-sent event with a JSON value."""
    return b"data: " + encode_json(value) + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. When the client leaves, work is cancelled to its end, then ClientDisconnected is raised.

    The request's body must have been read. Cancelling this cancels work.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class JsonAnswer(Response):
    """A whole answer, made by `work` while the client waits.

    RequestErrors pass on to the application's error handlers.
    """

    def __init__(self, work: Coroutine[Any, Any, object], metrics: Metrics) -> None:
        super().__init__(media_type="application/json")
        self._work = work
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer (ASGI)."""
        try:
            answer = await until_disconnect(receive, self._work)
        except ClientDisconnected:
            self._metrics.client_disconnected()
            await Response(status_code=CLIENT_CLOSED_REQUEST)(scope, receive, send)
        else:
            await Response(encode_json(answer), media_type="application/json")(scope, receive, send)


class EventStream(Response):
    """A stream of encoded events. The status line waits for the first one: before it, a failure is an HTTP error.

    After it, a failure is the stream's last event, and no [DONE] follows.
    """

    def __init__(self, events: AsyncGenerator[bytes], metrics: Metrics) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer (ASGI)."""
        async with aclosing(self._events):
            try:
                await until_disconnect(receive, self._send_all(send))
            except ClientDisconnected:
                self._metrics.client_disconnected()

    async def _send_all(self, send: Send) -> None:
        first = await anext(self._events)
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async for encoded in self._events:
                await send({"type": "http.response.body", "body": encoded, "more_body": True})
        except RequestError as error:
            await send({"type": "http.response.body", "body": error_event(error), "more_body": True})
        except Exception as error:
            log.exception("unhandled %s in a stream", type(error).__name__)
            failure = error_event(engine_failed("internal"))
            await send({"type": "http.response.body", "body": failure, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
