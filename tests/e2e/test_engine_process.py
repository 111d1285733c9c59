"""The engine as a real process: it answers, dies honestly, and outlives nobody."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from barista.errors import BaristaError, EngineFailed
from router.engine_process import EngineChild, EngineProcess
from router.framing import frame
from router.messages import EngineConfig, Failed, SamplingParams, Submit, Token, encode
from tests import tiny

Body = Callable[[EngineProcess], Coroutine[Any, Any, None]]
ENDLESS = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny.make("qwen3_moe", directory)
    return directory


def with_engine(checkpoint: Path, body: Body, **changes: Any) -> None:
    async def run() -> None:
        engine = EngineProcess(EngineConfig(path=str(checkpoint), kv_cache_tokens=2048, **changes))
        await engine.start()
        try:
            await asyncio.wait_for(body(engine), 60)
        finally:
            await engine.close()

    asyncio.run(run())


def gone(pid: int, seconds: float = 10) -> bool:
    """True once no such process runs."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False


async def collect(engine: EngineProcess, name: str, sampling: SamplingParams) -> list[Token | Failed]:
    return [event async for event in engine.submit(Submit(name, (5, 6, 7), sampling))]


def test_it_answers_and_counts(checkpoint: Path) -> None:
    async def body(engine: EngineProcess) -> None:
        one, two = await asyncio.gather(
            collect(engine, "a", SamplingParams(temperature=0, max_tokens=5)),
            collect(engine, "b", SamplingParams(temperature=0, max_tokens=5)),
        )
        assert [t.token_id for t in one] == [t.token_id for t in two]  # type: ignore[union-attr]
        assert one[-1].finish_reason == "length"  # type: ignore[union-attr]
        stats = await engine.stats()
        assert (stats.num_requests_running, stats.kv_blocks_used) == (0, 0)
        assert stats.iteration_tokens == 2 * (3 + 4)

    with_engine(checkpoint, body)


def test_its_traces_are_whole_when_it_has_been_closed(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "traces.jsonl"

    async def body(engine: EngineProcess) -> None:
        await collect(engine, "a", SamplingParams(temperature=0, max_tokens=5))
        await anext(engine.submit(Submit("b", (5, 6, 7), ENDLESS)))

    with_engine(checkpoint, body, trace_to=str(file), trace_ratio=0.0)
    ends = [json.loads(line)["attributes"] for line in file.read_text().splitlines()]
    assert [(end["barista.request_id"], end["barista.finish_reason"]) for end in ends] == [
        ("a", "length"),
        ("b", "aborted"),
    ]


def test_leaving_early_frees_the_blocks(checkpoint: Path) -> None:
    async def body(engine: EngineProcess) -> None:
        stream = engine.submit(Submit("a", (5, 6, 7), ENDLESS))
        await anext(stream)
        assert (await engine.stats()).num_requests_running == 1
        await stream.aclose()
        assert (await engine.stats()).kv_blocks_used == 0

    with_engine(checkpoint, body)


def test_a_killed_engine_fails_its_open_streams_and_new_ones(checkpoint: Path) -> None:
    async def body(engine: EngineProcess) -> None:
        stream = engine.submit(Submit("a", (5, 6, 7), ENDLESS))
        await anext(stream)
        os.kill(engine.pid, signal.SIGKILL)
        *_, last = [event async for event in stream]
        assert isinstance(last, Failed)
        assert last.code == "engine_dead"
        assert not engine.ready
        (refused,) = await collect(engine, "b", ENDLESS)
        assert isinstance(refused, Failed)
        with pytest.raises(EngineFailed):
            await engine.stats()

    with_engine(checkpoint, body)


def test_closing_ends_the_process(checkpoint: Path) -> None:
    pids = []

    async def body(engine: EngineProcess) -> None:
        pids.append(engine.pid)

    with_engine(checkpoint, body)
    assert gone(pids[0])


def test_an_engine_whose_parent_is_killed_ends_by_itself(checkpoint: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(checkpoint)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert parent.stdout is not None
    engine_pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(engine_pid)


def test_ctrl_c_while_it_imports_is_left_to_the_api() -> None:
    with contextlib.closing(EngineChild()) as child:
        process = Path(f"/proc/{child.process.pid}")
        deadline = time.monotonic() + 20
        while not ignores(process, signal.SIGINT):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert "libtorch" not in (process / "maps").read_text()
        child.process.send_signal(signal.SIGINT)
        child.socket.shutdown(socket.SHUT_RDWR)
        assert child.process.wait(30) == 0


def test_an_engine_whose_api_goes_while_it_loads_ends_in_silence(checkpoint: Path) -> None:
    with contextlib.closing(EngineChild()) as child:
        child.socket.sendall(frame(encode(EngineConfig(path=str(checkpoint), kv_cache_tokens=512))))
        child.socket.close()
        assert child.process.wait(30) == 0


def ignores(process: Path, number: signal.Signals) -> bool:
    """process: its folder in /proc."""
    lines = (process / "status").read_text().splitlines()
    mask = next(line for line in lines if line.startswith("SigIgn:")).split()[1]
    return bool(int(mask, 16) >> (number - 1) & 1)


PARENT = """
import asyncio, sys
from router.engine_process import EngineProcess
from router.messages import EngineConfig, SamplingParams

async def main():
    engine = EngineProcess(EngineConfig(path=sys.argv[1], kv_cache_tokens=512))
    await engine.start()
    print(engine.pid, flush=True)
    async for _ in engine.submit(Submit("a", (5, 6), SamplingParams(max_tokens=400, ignore_eos=True))):
        await asyncio.sleep(1)

asyncio.run(main())
"""


def test_a_checkpoint_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    tiny.make("llama", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10")

    async def start() -> None:
        engine = EngineProcess(EngineConfig(path=str(tmp_path)))
        try:
            await engine.start()
        finally:
            await engine.close()

    with pytest.raises(BaristaError, match=r"model\.safetensors"):
        asyncio.run(start())


def test_a_cache_larger_than_memory_is_refused_with_what_would_fit(checkpoint: Path) -> None:
    async def start() -> None:
        engine = EngineProcess(EngineConfig(path=str(checkpoint), kv_cache_bytes=10**15))
        try:
            await engine.start()
        finally:
            await engine.close()

    with pytest.raises(BaristaError, match="--kv-cache-tokens"):
        asyncio.run(start())


def test_an_engine_that_does_not_answer_does_not_hold_up_who_asks(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(engine: EngineProcess) -> None:
        os.kill(engine.pid, signal.SIGSTOP)
        try:
            with pytest.raises(EngineFailed, match="not answered"):
                await engine.stats()
            assert await engine.makes_progress()  # it has been silent for seconds, not for minutes
            monkeypatch.setattr("router.engine_process.PROGRESS_SECONDS", 1.0)
            assert not await engine.makes_progress()
        finally:
            os.kill(engine.pid, signal.SIGCONT)
        assert await engine.makes_progress()
        assert (await engine.stats()).num_requests_running == 0

    with_engine(checkpoint, body)
