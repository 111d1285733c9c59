"""python fake_server.py TOKEN_DELAY DRAIN_TIMEOUT [LOAD_SECONDS]: router.server around the fake engine, as a process.

Prints its port once it listens and "ready" when the engine is loaded. A line on standard input ends a part of it: the
engine, or with "http" uvicorn.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, Callable

from fake_engine import FakeEngine, FakeTemplate, FakeTokenizer

from barista.errors import BaristaError
from router.api.app import create_app
from router.api.settings import ApiSettings
from router.launch import listen
from router.messages import Failed, SamplingParams, Token
from router.server import Server


class FakeProcess(FakeEngine):
    """The fake engine with a beginning and an end."""

    def __init__(self, delay: float, load_seconds: float) -> None:
        super().__init__(script=lambda submit: [70] * 100, delay=delay, ready=False)
        self.died = asyncio.Event()
        self.load_seconds = load_seconds
        self.end_http: Callable[[], None] = lambda: None

    async def start(self, on_progress: Callable[[float, str], None]) -> None:
        on_progress(0.5, "fake weights")
        await asyncio.sleep(self.load_seconds)
        self.ready = True
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read_order, args=(loop,), daemon=True).start()

    def _read_order(self, loop: asyncio.AbstractEventLoop) -> None:
        order = sys.stdin.readline().strip()
        if order:
            loop.call_soon_threadsafe(self.end_http if order == "http" else self.die)

    def die(self) -> None:
        self.ready = False
        self.died.set()

    async def close(self) -> None:
        self.die()

    async def submit(
        self, request_id: str, prompt_token_ids: tuple[int, ...], sampling: SamplingParams, salt: bytes = b""
    ) -> AsyncGenerator[Token | Failed]:
        async for event in super().submit(request_id, prompt_token_ids, sampling, salt):
            if self.died.is_set():
                yield Failed(request_id, "engine_dead", "died")
                return
            yield event


async def main(delay: float, drain_timeout: float, load_seconds: float = 0.0) -> int:
    engine = FakeProcess(delay, load_seconds)
    app = create_app(engine, FakeTokenizer(), FakeTemplate(), ApiSettings())
    sock = listen("127.0.0.1", 0)
    print(sock.getsockname()[1], flush=True)
    server = Server(app, engine, drain_timeout=drain_timeout)
    engine.end_http = lambda: setattr(server._http, "should_exit", True)
    return await server.run(sock, lambda model: print("ready", flush=True), until_eof=False)


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main(*map(float, sys.argv[1:]))))
    except BaristaError as error:
        sys.exit(f"error: {error}")
