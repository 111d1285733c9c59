"""Load a server for minutes and watch for errors and leaks.

    python -m benchmarks.soak [MODEL] [--streams 16] [--minutes 5]

Starts `barista serve` on a free port and keeps `--streams` streams open through the official openai client: chat with
growing history, completions, seeds, stop strings, and one stream in ten dropped half-way. Passes when no request fails
that was not dropped, every stream ends with a finish_reason, no KV block is in use afterwards, and the resident memory
of server and engine after the first minute stays within 5 %.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import psutil

QUESTIONS = ("What is coffee?", "Tell me a story about a barista.", "Count to twenty.", "Why is the sky blue?")
TOLERANCE = 0.05


@dataclass
class Record:
    """What the clients saw, and resident bytes by second."""

    answers: int = 0
    dropped: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    resident: list[tuple[float, int]] = field(default_factory=list)


async def client(base_url: str, deadline: float, record: Record, seed: int) -> None:
    """One user: asks until the deadline."""
    dice = random.Random(seed)
    api = openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=120)
    history: list[dict[str, str]] = []
    while time.monotonic() < deadline:
        history = history[-4:] + [{"role": "user", "content": dice.choice(QUESTIONS)}]
        try:
            text = await ask(api, history, dice, record)
        except (openai.OpenAIError, httpx.HTTPError) as error:
            record.errors.append(repr(error))
            await asyncio.sleep(1)
            continue
        history.append({"role": "assistant", "content": text})


async def ask(api: openai.AsyncOpenAI, history: list[dict[str, str]], dice: random.Random, record: Record) -> str:
    """One streamed answer, sometimes left half-way."""
    limit = dice.randrange(8, 96)
    leave_at = dice.randrange(1, 8) if dice.random() < 0.1 else None
    stream = await api.chat.completions.create(
        model="house-blend", messages=history, max_tokens=limit, seed=dice.randrange(1000),
        temperature=dice.choice([0.0, 0.7, 1.0]), stop=dice.choice([None, ["\n\n"]]), stream=True,
    )  # fmt: skip
    pieces, finish = [], None
    async for chunk in stream:
        record.tokens += 1
        pieces.append(chunk.choices[0].delta.content or "")
        finish = chunk.choices[0].finish_reason or finish
        if leave_at is not None and len(pieces) >= leave_at:
            await stream.close()
            record.dropped += 1
            return "".join(pieces)
    if finish is None:
        record.errors.append("a stream ended without finish_reason")
    record.answers += 1
    return "".join(pieces)


async def watch(server: psutil.Process, deadline: float, record: Record) -> None:
    """Resident memory of the server and its children, once a second."""
    started = time.monotonic()
    while time.monotonic() < deadline:
        processes = [server, *server.children(recursive=True)]
        record.resident.append((time.monotonic() - started, sum(p.memory_info().rss for p in processes)))
        await asyncio.sleep(1)


async def soak(args: argparse.Namespace, port: int, pid: int) -> Record:
    """All clients and the watcher until the deadline."""
    record, deadline = Record(), time.monotonic() + args.minutes * 60
    url = f"http://127.0.0.1:{port}/v1"
    clients = [client(url, deadline, record, seed) for seed in range(args.streams)]
    await asyncio.gather(watch(psutil.Process(pid), deadline, record), *clients)
    return record


def verdict(record: Record, minutes: float, metrics: str) -> list[str]:
    """What is wrong; empty when all is well."""
    problems = record.errors[:10]
    settled = [size for second, size in record.resident if second > min(60, minutes * 20)]
    tenth = max(1, len(settled) // 10)
    first, last = statistics.median(settled[:tenth]), statistics.median(settled[-tenth:])
    print(f"{record.answers} answers, {record.dropped} dropped, {record.tokens} chunks, {len(record.errors)} errors")
    print(f"resident after the first minute {first / 2**20:.0f} MiB, at the end {last / 2**20:.0f} MiB")
    if last > first * (1 + TOLERANCE):
        problems.append(f"resident memory grew by {last / first - 1:.1%}")
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        value = re.search(rf"^barista:{name}(?:{{.*}})? (\S+)$", metrics, re.MULTILINE)
        if value is None or float(value[1]) != 0:
            problems.append(f"barista:{name} is {value and value[1]} after the last stream")
    if not record.answers:
        problems.append("no answer at all")
    return problems


def main() -> None:
    """Run, print, exit 1 on any problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="house-blend")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=5)
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("barista")), "serve", args.model, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until_ready(server, port)
        record = asyncio.run(soak(args, port, server.pid))
        time.sleep(2)
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    problems = verdict(record, args.minutes, metrics) + ([f"the server exited with {code}"] if code else [])
    print("\n".join(f"FAILED: {problem}" for problem in problems) or "passed")
    sys.exit(bool(problems))


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    """Poll /ready; the first start may carve the model."""
    for _ in range(600):
        if server.poll() is not None:
            sys.exit(f"the server exited with {server.returncode}")
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    sys.exit("the server was not ready within two minutes")


if __name__ == "__main__":
    main()
