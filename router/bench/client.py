"""One request of a load: a chat whose answer is streamed, timed as its bytes arrive."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

import httpx

from barista.errors import BaristaError, ConfigError
from router.bench.record import Answer, Failure, Record
from router.server_client import ServerClient, as_barista_error, refusal
from router.sse import DONE, EventData

# Fields that a server may not know, or not take; the benchmark can do without them.
OPTIONAL: dict[str, Any] = {"ignore_eos": True, "stream_options": {"include_usage": True}, "temperature": 0}
TEXT = ("content", "reasoning_content", "reasoning")  # the last two: what a model thinks, at SGLang and vLLM
# Shorter than the usual five seconds of a server, which would close a connection at the moment it is used again.
KEEPALIVE_SECONDS = 2.0


class RequestFailed(BaristaError):
    """Why a request has no whole answer. kind: as in Failure."""

    def __init__(self, kind: str, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.kind = kind


class BenchClient:
    """Sends chats to one server; an async context manager, which closes its connections.

    body: every field of the request but the messages, see chat_body. timeout: seconds for a whole answer.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        body: dict[str, Any],
        timeout: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._body = body
        self._timeout = timeout
        self._clock = clock
        self._tls = httpx.create_ssl_context(trust_env=False)
        self._free: list[httpx.AsyncClient] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for http in self._free:
            await http.aclose()

    async def ask(self, content: str, start: float) -> Record:
        """Send a message that came into the world at `start`, and follow the answer to its end. Raises nothing."""
        sent = self._clock()
        stream = ChatStream()
        try:
            async with asyncio.timeout(self._timeout):
                await self._follow(content, stream)
            return stream.answer(start, sent)
        except (RequestFailed, httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            why, end = self._explain(error), self._clock()
            return Failure(start=start, end=end, kind=why.kind, message=why.message, remedy=why.remedy)

    async def _follow(self, content: str, stream: ChatStream) -> None:
        body = {**self._body, "messages": [{"role": "user", "content": content}]}
        async with (
            self._connection() as http,
            http.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            if response.status_code != httpx.codes.OK:
                await response.aread()
                raise _refused(response)
            # Beyond [DONE] to the end of the body, or the connection could not serve the next request.
            async for piece in response.aiter_bytes():
                stream.feed(piece, self._clock())

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[httpx.AsyncClient]:
        """An HTTP client of one connection, for one request at a time.

        One client for all would look through all its connections whenever a request comes or goes, and that time would
        be measured as the server's: 64 requests at once waited seconds for it (encode/httpcore#1035).
        """
        http = self._free.pop() if self._free else self._new_connection()
        try:
            yield http
        finally:
            self._free.append(http)

    def _new_connection(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=1, keepalive_expiry=KEEPALIVE_SECONDS)
        return httpx.AsyncClient(
            base_url=self._url,
            headers=self._headers,
            timeout=None,
            limits=limits,
            verify=self._tls,
            trust_env=False,
        )

    def _explain(self, error: Exception) -> RequestFailed:
        match error:
            case RequestFailed():
                return error
            case TimeoutError():
                return RequestFailed(
                    "timeout", f"No whole answer within {self._timeout:g} s.", "Try a longer --timeout."
                )
            case httpx.ConnectError() | httpx.UnsupportedProtocol() | httpx.InvalidURL():
                message = f"Cannot connect to {self._url}: {error}."
                return RequestFailed("connect", message, "Is the server running there?")
            case _:
                return RequestFailed("broken_stream", f"A stream broke: {str(error) or type(error).__name__}.")


class ChatStream:
    """What a stream of chat chunks has held so far."""

    def __init__(self) -> None:
        self._events = EventData()
        self._begun = False
        self._chunks: list[float] = []
        self._usage: tuple[int, int] | None = None
        self._done: float | None = None

    def feed(self, piece: bytes, now: float) -> None:
        """A piece of the body that arrived at `now`. Raises RequestFailed."""
        try:
            for data in self._events.feed(piece):
                self._begun = True
                if data == DONE:
                    self._done = now
                else:
                    self._read(json.loads(data), now)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RequestFailed("bad_answer", "The server's stream does not hold OpenAI's chunks.") from error

    def _read(self, event: dict[str, Any], now: float) -> None:
        if error := event.get("error"):
            message = error.get("message") if isinstance(error, dict) else error
            raise RequestFailed("error_event", f"The server ended a stream with an error: {message}")
        if any((choice.get("delta") or {}).get(name) for choice in event["choices"] for name in TEXT):
            self._chunks.append(now)
        if usage := event.get("usage"):
            self._usage = int(usage["prompt_tokens"]), int(usage["completion_tokens"])

    def answer(self, start: float, sent: float) -> Answer:
        """The whole. Raises RequestFailed if it is none."""
        if not self._begun:
            raise RequestFailed("bad_answer", "The server answered with something that is no stream.")
        if self._done is None:
            raise RequestFailed("broken_stream", "A stream ended before it was complete.")
        if not self._chunks:
            raise RequestFailed("empty", "A stream held no text.")
        prompt_tokens, completion_tokens = self._usage or (None, None)
        return Answer(
            start=start,
            sent=sent,
            chunks=tuple(self._chunks),
            end=self._done,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
        )


def chat_body(model: str, output_len: int, omit: Sequence[str] = ()) -> dict[str, Any]:
    """The request without its messages: greedy, and `output_len` tokens whatever the model would say.

    omit: names of OPTIONAL to leave out. Raises ConfigError: a name that is not there.
    """
    if unknown := set(omit) - OPTIONAL.keys():
        raise ConfigError(f"--omit {min(unknown)} is no field to leave out.", f"There are {', '.join(OPTIONAL)}.")
    optional = {name: value for name, value in OPTIONAL.items() if name not in omit}
    return {"model": model, "stream": True, "max_tokens": output_len, **optional}


def count_tokens(server: ServerClient, model: str, content: str) -> int | None:
    """The tokens of a chat of one message, by the server's POST /tokenize (vLLM's); None if it has none."""
    try:
        with as_barista_error(server.url):
            messages = [{"role": "user", "content": content}]
            return int(server.post("/tokenize", {"model": model, "messages": messages})["count"])
    except BaristaError:
        return None


def _refused(response: httpx.Response) -> RequestFailed:
    """An answer other than 200. A server that does not know one of the optional fields names it."""
    error = refusal(response)
    kind = f"http_{response.status_code}"
    named = [name for name in OPTIONAL if name in response.text]
    if response.status_code not in (400, 422) or len(named) != 1:
        return RequestFailed(kind, error.message, error.remedy)
    return RequestFailed(kind, f"The server refuses {named[0]}: {error.message}", f"Try --omit {named[0]}.")
