"""An engine, a tokenizer and a chat template without a model, for tests of the API."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from barista.errors import EngineFailed
from router.api.app import create_app
from router.api.settings import ApiSettings
from router.messages import ExpertCacheStats, Failed, ModelInfo, PoolStats, Stats, Submit, Token
from router.pool_client import PoolClient

EOS = 0
PIECES = (" the", " cup", "espresso", "STOP", "top", " ☕", "Hello", ", ")
FIRST_BYTE, FIRST_PIECE = 1, 257
VOCAB_SIZE = FIRST_PIECE + len(PIECES)


class FakeTokenizer:
    """Token 0 is EOS, 1..256 are the bytes, the rest are PIECES. Encoding uses bytes only."""

    vocab_size = VOCAB_SIZE
    eos_token_ids = (EOS,)
    chat_template = None
    special_token_ids = frozenset({EOS})
    is_byte_level = True

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [FIRST_BYTE + byte for byte in text.encode()]

    def token_bytes(self, token_id: int) -> bytes:
        if token_id == EOS:
            return b"<eos>"
        if token_id < FIRST_PIECE:
            return bytes([token_id - FIRST_BYTE])
        return PIECES[token_id - FIRST_PIECE].encode()

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        shown = [i for i in ids if not (skip_special_tokens and i in self.special_token_ids)]
        return b"".join(self.token_bytes(i) for i in shown).decode("utf-8", "replace")


class FakeTemplate:
    """role: text, one message a line."""

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **_: Any) -> str:
        lines = [f"{message['role']}: {message['content']}" for message in messages]
        return "\n".join(lines + (["assistant:"] if add_generation_prompt else []))


def random_tokens(submit: Submit) -> list[int]:
    """What a model would do: tokens that depend on the prompt and the seed alone; EOS, and more for who ignores it."""
    tokens: list[int] = []
    for index in range(12):
        key = f"{submit.prompt_token_ids}{submit.sampling.seed}{index}".encode()
        tokens.append(1 + int.from_bytes(hashlib.sha256(key).digest()[:4], "little") % (VOCAB_SIZE - 1))
    return [*tokens, EOS] * (1 + submit.sampling.max_tokens // 13 if submit.sampling.ignore_eos else 1)


@dataclass
class FakeEngine:
    """Plays `script(submission)`, one token every `delay` seconds.

    fail: index of the token in whose place Failed(fail_code) comes. gate: tokens from number gate_at wait for it.
    pool, expert_cache: what it tells of its workers and of its experts in memory. hung: it answers no question about
    itself.
    submitted: every submission. aborted: request ids that were closed before their end.
    """

    script: Callable[[Submit], Sequence[int]] = random_tokens
    delay: float = 0.0
    fail: int | None = None
    fail_code: str = "internal"
    max_model_len: int = 256
    kv_capacity_tokens: int = 1024
    ready: bool = True
    gate: asyncio.Event | None = None
    gate_at: int = 0
    submitted: list[Submit] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    pool: PoolStats | None = None
    expert_cache: ExpertCacheStats | None = None
    hung: bool = False
    numerics_id: str = "fake-f32"
    progress: bool = True

    @property
    def model(self) -> ModelInfo:
        if not self.ready:
            raise EngineFailed("not loaded")
        return ModelInfo(
            vocab_size=VOCAB_SIZE,
            max_model_len=self.max_model_len,
            kv_capacity_tokens=self.kv_capacity_tokens,
            eos_token_ids=(EOS,),
            kv_bytes_per_token=64,
            dtype="float32",
            num_layers=2,
            num_experts=4,
            numerics_id=self.numerics_id,
        )

    async def submit(self, submit: Submit) -> AsyncGenerator[Token | Failed]:
        request_id = submit.request_id
        self.submitted.append(submit)
        finished = False
        drawn = len(submit.drawn_token_ids)
        try:
            for index, token_id in enumerate(islice(self.script(submit), drawn, None), drawn):
                await asyncio.sleep(self.delay)
                if self.gate is not None and index >= self.gate_at:
                    await self.gate.wait()
                finished = index == self.fail
                if finished:
                    yield Failed(request_id, self.fail_code, "secret internals")
                    return
                token = self._token(submit, index, token_id)
                finished = token.finish_reason is not None
                yield token
                if finished:
                    return
        finally:
            if not finished:
                self.aborted.append(request_id)

    async def makes_progress(self) -> bool:
        return self.progress

    async def stats(self) -> Stats:
        await asyncio.sleep(self.delay)
        if self.hung:
            raise EngineFailed("no answer", status=503, code="engine_busy")
        return Stats(
            num_requests_running=1,
            kv_blocks_total=8,
            kv_blocks_used=2,
            prefix_cache_queries=10,
            prefix_cache_hits=4,
            steps=5,
            step_seconds=0.5,
            iteration_tokens=20,
            expert_tokens=((), (30, 10, 0, 0)),
            pool=self.pool,
            expert_cache=self.expert_cache,
        )

    def _token(self, submit: Submit, index: int, token_id: int) -> Token:
        sampling = submit.sampling
        ends = token_id in sampling.stop_token_ids or (token_id == EOS and not sampling.ignore_eos)
        reason = "stop" if ends else "length" if index + 1 == sampling.max_tokens else None
        wanted = sampling.logprobs
        return Token(
            request_id=submit.request_id,
            index=index,
            token_id=token_id,
            finish_reason=reason,
            logprob=None if wanted is None else -0.5,
            top_logprobs=tuple((FIRST_BYTE + 65 + i, float("-inf") if i else -0.25) for i in range(wanted or 0)),
            num_cached_tokens=3,
        )


def fake_app(
    engine: FakeEngine | None = None, *, template: bool = True, pool: PoolClient | None = None, **settings: Any
) -> FastAPI:
    """The API on a fake engine."""
    chat_template = FakeTemplate() if template else None
    return create_app(engine or FakeEngine(), FakeTokenizer(), chat_template, ApiSettings(**settings), pool)


def client(app: FastAPI, **options: Any) -> httpx.AsyncClient:
    """A client in the same process; close it with `async with`."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", **options)


def tokens_of(text: str) -> list[int]:
    """A script that says `text`, in pieces where there are some, and ends."""
    tokens: list[int] = []
    while text:
        piece = next((piece for piece in PIECES if text.startswith(piece)), None)
        known = [FIRST_PIECE + PIECES.index(piece)] if piece else [FIRST_BYTE + byte for byte in text[0].encode()]
        tokens, text = tokens + known, text[len(piece or text[0]) :]
    return [*tokens, EOS]


def events_of(body: str) -> list[Any]:
    """The events of a stream: JSON values, and "[DONE]" as it is."""
    blocks = body.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    return [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """A real server on a free port of the loopback interface, in a thread; yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()
