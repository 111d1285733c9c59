"""An OpenAI server without a model: every request gets the answer that a story tells."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

Story = Callable[[int, dict[str, Any]], Response]  # the request's number from 0, and its body
DONE = b"data: [DONE]\n\n"


@dataclass
class FakeOpenAI:
    """What the server does now; see `tell`.

    counts: the tokens of a message, for POST /tokenize; None: there is no such route. bodies: every request since then.
    """

    story: Story
    counts: Callable[[str], int] | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def tell(self, story: Story, counts: Callable[[str], int] | None = None) -> None:
        """Answer from now on as told."""
        self.story, self.counts, self.bodies = story, counts, []

    def app(self) -> FastAPI:
        """The server's application."""
        app = FastAPI()

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"object": "list", "data": [{"id": "espresso"}, {"id": "decaf"}]}

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            self.bodies.append(await request.json())
            return self.story(len(self.bodies) - 1, self.bodies[-1])

        @app.post("/tokenize")
        async def tokenize(request: Request) -> Response:
            content = (await request.json())["messages"][0]["content"]
            return JSONResponse({"count": self.counts(content)}) if self.counts else Response(status_code=404)

        return app


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunk(**delta: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": delta}], "usage": None})


def usage(prompt_tokens: int, completion_tokens: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}})


def stream(*pieces: bytes | float | Exception) -> Response:
    """Bytes are sent, numbers are seconds of silence, an exception breaks the connection."""

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, float):
                await asyncio.sleep(piece)
            else:
                yield piece

    return StreamingResponse(body(), media_type="text/event-stream")


def answer(tokens: int = 4, *, ttft: float = 0.0, gap: float = 0.0) -> Response:
    """One token a chunk, the role before them and the count behind."""
    first, *rest = [chunk(content=" tea")] * tokens
    later = [piece for token in rest for piece in (gap, token)]
    return stream(chunk(role="assistant", content=""), ttft, first, *later, usage(9, tokens), DONE)


def refusal(status: int, body: object) -> Response:
    return JSONResponse(body, status)
