"""python fake_server.py TOKEN_DELAY DRAIN_TIMEOUT [LOAD_SECONDS [KEEPER]]: router.server around the fake engine.

Prints its port once it listens, and "ready" and its address for gRPC when the engine is loaded. A line on standard
input ends a part of it: the engine, or with "http" uvicorn, or with "keeper" the keeper of its pool. KEEPER: "own" for
a pool that ends with it, "named" for one that does not, or a story of fake_keeper.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from fake_engine import FakeEngine, FakeTemplate, FakeTokenizer

from barista.errors import BaristaError
from experts.cluster.messages import PoolConfig
from experts.expert_model import ExpertModel
from experts.spec import FFNSpec
from router.api.app import create_app
from router.api.settings import ApiSettings
from router.launch import listen
from router.messages import Failed, PoolAddress, Submit, Token
from router.pool_process import PoolProcess
from router.server import Server

FFN = FFNSpec(num_experts=4, hidden_size=32, intermediate_size=16)
ORDER = PoolConfig(
    pool=None, workers=2, threads=1, redundancy=2, worker_memory=None, tls_dir=None, expert_bytes={1: 6144},
    model=ExpertModel(path=Path("/model"), dtype="float32", top_k=2, layers={1: FFN}, digest=b"d" * 16),
)  # fmt: skip


class FakeProcess(FakeEngine):
    """The fake engine with a beginning and an end."""

    def __init__(self, delay: float, load_seconds: float) -> None:
        super().__init__(script=lambda submit: [70] * 100, delay=delay, ready=False)
        self.died = asyncio.Event()
        self.load_seconds = load_seconds
        self.endings: dict[str, Callable[[], None]] = {"die": self.die}

    async def start(self, on_progress: Callable[[float, str], None], pool: PoolAddress | None = None) -> None:
        on_progress(0.5, "fake weights")
        await asyncio.sleep(self.load_seconds)
        self.ready = True
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read_order, args=(loop,), daemon=True).start()

    def _read_order(self, loop: asyncio.AbstractEventLoop) -> None:
        for order in sys.stdin:
            loop.call_soon_threadsafe(self.endings[order.strip()])

    def die(self) -> None:
        self.ready = False
        self.died.set()

    async def close(self) -> None:
        self.die()

    async def submit(self, submit: Submit) -> AsyncGenerator[Token | Failed]:
        async for event in super().submit(submit):
            if self.died.is_set():
                yield Failed(submit.request_id, "engine_dead", "died")
                return
            yield event


def fake_pool(kind: str) -> PoolProcess:
    story = "starts" if kind in ("own", "named") else kind
    command = (sys.executable, str(Path(__file__).with_name("fake_keeper.py")), story)
    return PoolProcess(ORDER, transport="auto", outlives_keeper=kind == "named", command=command)


async def main(delay: str, drain_timeout: str, load_seconds: str = "0", keeper: str = "") -> int:
    engine = FakeProcess(float(delay), float(load_seconds))
    pool = fake_pool(keeper) if keeper else None
    app = create_app(engine, FakeTokenizer(), FakeTemplate(), ApiSettings())
    sock = listen("127.0.0.1", 0)
    print(sock.getsockname()[1], flush=True)
    server = Server(app, engine, pool, drain_timeout=float(drain_timeout), grpc_port=0)
    engine.endings["http"] = lambda: setattr(server._http, "should_exit", True)
    engine.endings["keeper"] = lambda: pool._process.kill()
    return await server.run(sock, lambda model: print(f"ready\n{server.grpc_address}", flush=True), until_eof=False)


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main(*sys.argv[1:])))
    except BaristaError as error:
        sys.exit(f"error: {error}")
