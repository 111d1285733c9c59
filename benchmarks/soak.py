"""Load a server for minutes, do harm to its workers, and watch for errors, wrong answers and leaks.

    python -m benchmarks.soak [MODEL] [--streams 16] [--minutes 5] [--workers N [--faults 50] [--seed 0]]

Starts `barista serve` on a free port and keeps `--streams` streams open through the official openai client: chats of
several turns, greedy and seeded, stop strings, and one stream in ten dropped half-way. Every answer must be the first
one to the same request: text, finish_reason and token count. Passes when no request fails that was not dropped, no KV
block is in use afterwards, and the resident memory of server and engine after the first minute stays within 5 %.

With workers, the answers must be those of a server without. Meanwhile faults hit one worker after another, the next
when the pool is whole again: SIGKILL, SIGSTOP for 0.3 to 3 s, drain, scale, rebalance. Afterwards no process may hold
more threads, files or windows than before, and no process may outlive the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import psutil

from benchmarks.belongings import belongings, leaks, resident_bytes
from benchmarks.faults import Faults, NotWhole

QUESTIONS = ("What is coffee?", "Tell me a story about a barista.", "Count to twenty.", "Why is the sky blue?")
DISTINCT_REQUESTS = 24
TOLERANCE = 0.05
SERVER = (sys.executable, "-m", "router.cli", "serve")
# Long enough for a stream that waits for a worker's replacement.
ANSWER_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Answer:
    """All of one answer that a client can see."""

    text: str
    finish_reason: str | None
    completion_tokens: int | None


@dataclass
class Record:
    """What the clients saw.

    expected: the answer to each request, by number. gaps: the longest time in seconds between two tokens of a stream,
    by what happened meanwhile ("" for nothing). resident: bytes by second.
    """

    expected: dict[int, Answer] = field(default_factory=dict)
    answers: int = 0
    dropped: int = 0
    chunks: int = 0
    errors: list[str] = field(default_factory=list)
    gaps: dict[str, float] = field(default_factory=dict)
    resident: list[tuple[float, int]] = field(default_factory=list)


def nth_request(number: int) -> dict[str, Any]:
    """A function of its number. Chats of several turns share their beginnings."""
    dice = random.Random(number)
    messages = [{"role": "user", "content": dice.choice(QUESTIONS)}]
    for _ in range(dice.randrange(3)):
        messages += [
            {"role": "assistant", "content": "That is a good question."},
            {"role": "user", "content": dice.choice(QUESTIONS)},
        ]
    return {
        "messages": messages,
        "max_tokens": dice.randrange(8, 96),
        "seed": number,
        "temperature": dice.choice([0.0, 0.7, 1.0]),
        "stop": dice.choice([None, ["\n\n"]]),
    }


class Clients:
    """Users of the server at `url`. meanwhile: what happens to it, for `Record.gaps`."""

    def __init__(self, url: str, model: str, record: Record, meanwhile: Callable[[], str] = str) -> None:
        self._api = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=ANSWER_SECONDS)
        self._model = model
        self._record = record
        self._meanwhile = meanwhile

    async def ask_all(self, streams: int) -> None:
        """Every request once."""
        numbers = iter(range(DISTINCT_REQUESTS))

        async def one() -> None:
            for number in numbers:
                await self._ask(number, None)

        await asyncio.gather(*(one() for _ in range(streams)))

    async def use(self, seed: int, over: Callable[[], bool]) -> None:
        """One user: asks until it is over, and sometimes leaves half-way."""
        dice = random.Random(seed)
        while not over():
            leave_at = dice.randrange(1, 8) if dice.random() < 0.1 else None
            try:
                await self._ask(dice.randrange(DISTINCT_REQUESTS), leave_at)
            except (openai.OpenAIError, httpx.HTTPError) as error:
                self._record.errors.append(f"{error!r} during {self._meanwhile() or 'no fault'}")
                await asyncio.sleep(1)

    async def close(self) -> None:
        """End the connections."""
        await self._api.close()

    async def _ask(self, number: int, leave_at: int | None) -> None:
        record, pieces, finish, tokens = self._record, [], None, None
        last: float | None = None
        stream = await self._api.chat.completions.create(
            model=self._model, stream=True, stream_options={"include_usage": True}, **nth_request(number)
        )
        async for chunk in stream:
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            for choice in chunk.choices:
                finish = choice.finish_reason or finish
                if choice.delta.content:
                    last = self._token_came(last)
                    pieces.append(choice.delta.content)
            if leave_at is not None and len(pieces) >= leave_at:
                await stream.close()
                record.dropped += 1
                return
        record.answers += 1
        answer = Answer("".join(pieces), finish, tokens)
        if finish is None or tokens is None:
            record.errors.append(f"request {number}: a stream ended without finish_reason or usage")
        elif answer != record.expected.setdefault(number, answer):
            during = self._meanwhile() or "no fault"
            record.errors.append(f"request {number} during {during}: {answer}, not {record.expected[number]}")

    def _token_came(self, last: float | None) -> float:
        now, what = time.monotonic(), self._meanwhile()
        self._record.chunks += 1
        if last is not None:
            self._record.gaps[what] = max(self._record.gaps.get(what, 0.0), now - last)
        return now


@dataclass(frozen=True)
class Served:
    """A server that runs. model: its id."""

    process: psutil.Process
    url: str
    model: str


@contextmanager
def served(model: str, problems: list[str], *flags: str) -> Iterator[Served]:
    """A server on a free port, ready; ended by SIGTERM. What is wrong about its end goes to `problems`."""
    server = subprocess.Popen([*SERVER, model, "--port", "0", "--json", *flags], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    family: list[psutil.Process] = []
    try:
        ready = server.stdout.readline()
        if not ready:
            sys.exit(f"the server exited with {server.wait()}")
        process = psutil.Process(server.pid)
        yield Served(process, **json.loads(ready))
        family = process.children(recursive=True)
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    _, alive = psutil.wait_procs(family, timeout=5)
    problems += [f"{process} outlives the server" for process in alive]
    problems += [f"the server exited with {code}"] if code else []


async def watch(server: psutil.Process, over: Callable[[], bool], record: Record) -> None:
    """Resident memory of the server and its engine, once a second."""
    started = time.monotonic()
    while not over():
        record.resident.append((time.monotonic() - started, resident_bytes(server)))
        await asyncio.sleep(1)


async def expect(server: Served, streams: int, record: Record) -> None:
    """Ask for every answer while nothing happens to the server."""
    clients = Clients(server.url, server.model, record)
    await clients.ask_all(streams)
    await clients.close()


async def soak(server: Served, args: argparse.Namespace, record: Record) -> list[str]:
    """All clients until the minutes, and the faults, are over. Returns what is wrong with the pool."""
    seconds = args.minutes * 60
    faults = Faults(server.url, args.workers, random.Random(args.seed))
    await expect(server, args.streams, record)
    before = belongings(server.process, await faults.whole()) if args.workers else {}
    clients = Clients(server.url, server.model, record, lambda: faults.current)
    script = asyncio.create_task(faults.run(args.faults, seconds) if args.workers else asyncio.sleep(seconds))
    await asyncio.gather(
        watch(server.process, script.done, record),
        *(clients.use(seed, script.done) for seed in range(args.streams)),
    )
    await clients.close()
    problems = [str(script.exception())] if isinstance(script.exception(), NotWhole) else []
    if not problems:
        script.result()
        await asyncio.sleep(2)
        after = belongings(server.process, await faults.whole()) if args.workers else {}
        problems = leaks(before, after)
        print_faults(faults, before, after)
    await faults.close()
    return problems


def print_faults(faults: Faults, before: dict[str, int], after: dict[str, int]) -> None:
    """How often each kind happened, and what the processes held before and after."""
    for kind, count in sorted(faults.done.items()):
        print(f"{kind}: {count} times, whole again after {faults.recovery[kind]:.1f} s at most")
    for name, count in after.items():
        print(f"{name}: {before[name]} before, {count} after")


def verdict(record: Record, metrics: str) -> list[str]:
    """What is wrong with what the clients saw; empty when all is well."""
    problems = record.errors[:10]
    length = record.resident[-1][0] if record.resident else 0.0
    settled = [size for second, size in record.resident if second >= min(60, length / 3)]
    tenth = max(1, len(settled) // 10)
    first, last = statistics.median(settled[:tenth]), statistics.median(settled[-tenth:])
    print(f"{record.answers} answers, {record.dropped} dropped, {record.chunks} chunks, {len(record.errors)} errors")
    for what, gap in sorted(record.gaps.items()):
        print(f"longest gap between two tokens during {what or 'no fault'}: {gap:.3f} s")
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
    args = parse(sys.argv[1:])
    record = Record()
    problems: list[str] = []
    if args.workers:
        with served(args.model, problems) as server:
            asyncio.run(expect(server, args.streams, record))
    flags = ["--workers", str(args.workers)] if args.workers else []
    with served(args.model, problems, *flags) as server:
        problems += asyncio.run(soak(server, args, record))
        time.sleep(2)
        metrics = httpx.get(f"{server.url}/metrics").text
    problems = verdict(record, metrics) + problems
    print("\n".join(f"FAILED: {problem}" for problem in problems) or "passed")
    sys.exit(bool(problems))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="house-blend")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--faults", type=int, default=50, help="in all; only with --workers")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
