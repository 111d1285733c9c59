"""`barista serve` with its experts on workers, as a process of its own, and streams that are read from it meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import openai
import psutil

from barista.cache import cache_root
from experts import kernels

ROOT = Path(__file__).parents[2]
START_SECONDS = 120.0  # on a busy machine; most of it is importing torch in every process
COMMAND_SECONDS = 60.0
END_SECONDS = 15.0
STREAMS = 8
MARK = "SERVER_OF_A_TEST"  # an environment variable, which every process of a server inherits


def barista(*arguments: object) -> list[str]:
    """A command line for subprocess."""
    return [sys.executable, "-m", "router.cli", *map(str, arguments)]


def isolated(folder: Path, **variables: str) -> dict[str, str]:
    """An environment whose cache shares nothing with other servers but what is compiled."""
    kernels.load()
    cache = folder / "cache"
    if not cache.exists():
        cache.mkdir()
        (cache / "kernels").symlink_to(cache_root() / "kernels")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "BARISTA_"))}
    return kept | {"BARISTA_CACHE": str(cache), "PYTHONPATH": str(ROOT)} | variables


class Server:
    """A context manager, which leaves no process behind. start_seconds: until it said that it is ready."""

    def __init__(self, environment: Mapping[str, str], *arguments: object) -> None:
        self._mark = secrets.token_hex(8)
        began = time.monotonic()
        self.process = subprocess.Popen(
            barista("serve", *arguments, "--port", 0, "--json"),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env={**environment, MARK: self._mark},
        )  # fmt: skip
        with self._killed_on_error():
            late = threading.Timer(START_SECONDS, self.process.kill)
            late.start()
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            late.cancel()
            assert line, "the server did not start: its lines above may say why"
            self.start_seconds = time.monotonic() - began
            self.url: str = json.loads(line)["url"]
            self.http = httpx.Client(base_url=self.url, trust_env=False, timeout=COMMAND_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self._kill()

    def command(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """`barista ARGUMENTS --url ...`, to its end."""
        return subprocess.run(
            barista(*arguments, "--url", self.url),
            capture_output=True, text=True, timeout=COMMAND_SECONDS, cwd=ROOT, check=False,
        )  # fmt: skip

    def pool(self) -> Any:
        """What `barista status --json` prints, without a process for it."""
        return self.http.get("/pool").raise_for_status().json()

    def workers(self) -> dict[str, Any]:
        """By name."""
        return {worker["name"]: worker for worker in self.pool()["workers"]}

    def wait(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first workers() that satisfy it."""
        deadline = time.monotonic() + COMMAND_SECONDS
        while not condition(workers := self.workers()):
            assert time.monotonic() < deadline, workers
            time.sleep(0.05)
        return workers

    def processes(self) -> set[psutil.Process]:
        """Every living process of this server: its descendants, and what has its environment, whoever adopted it."""
        found = {process for process in psutil.process_iter() if self._is_marked(process)}
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            found |= {own, *own.children(recursive=True)}
        return {process for process in found if _lives(process)}

    def wait_gone(self, processes: set[psutil.Process]) -> None:
        """Return when none of these is left, nor any other of this server. Fails with what is left if it takes long."""
        deadline = time.monotonic() + END_SECONDS
        while left := {process for process in processes if _lives(process)} | self.processes():
            assert time.monotonic() < deadline, left
            time.sleep(0.05)

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return f"{MARK}={self._mark}".encode() in Path(f"/proc/{process.pid}/environ").read_bytes()
        except OSError:  # it has gone, or is another user's
            return False

    @contextlib.contextmanager
    def _killed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._kill()
            raise

    def _kill(self) -> None:
        """In order, then by force."""
        processes = self.processes()
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        for process in processes | self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate()


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def shared_memory(processes: set[psutil.Process]) -> set[Path]:
    """The segments in /dev/shm that they have mapped, with or without a name."""
    maps = "".join(Path(f"/proc/{process.pid}/maps").read_text() for process in processes)
    return {Path(line.split()[5]) for line in maps.splitlines() if " /dev/shm/" in line}


@dataclass(frozen=True)
class Answer:
    """A stream to its end. tokens: their texts and logprobs. to_first: seconds until the first token; longest_gap:
    between two events from there on."""

    text: str
    tokens: tuple[tuple[str, float], ...]
    finish_reason: str | None
    to_first: float = field(compare=False)
    longest_gap: float = field(compare=False)


def ask(client: openai.OpenAI, number: int, on_token: Callable[[], None] = lambda: None) -> Answer:
    """The answer to one of KINDS questions, which is a function of its number. Raises what the client raises."""
    started = last = time.monotonic()
    to_first, gap, text, finish_reason = 0.0, 0.0, "", None
    tokens: list[tuple[str, float]] = []
    for chunk in client.chat.completions.create(**_question(number), stream=True):
        choice, now = chunk.choices[0], time.monotonic()
        text += choice.delta.content or ""
        finish_reason = choice.finish_reason or finish_reason
        drawn = choice.logprobs.content if choice.logprobs else None
        if tokens:
            gap = max(gap, now - last)
        elif drawn:
            to_first = now - started
        last = now
        for token in drawn or ():
            tokens.append((token.token, token.logprob))
            on_token()
    return Answer(text, tuple(tokens), finish_reason, to_first, gap)


KINDS = 16
_SAMPLING: Sequence[dict[str, Any]] = ({"temperature": 0}, {"temperature": 1.2}, {"temperature": 0.8, "top_p": 0.7})


def _question(number: int) -> dict[str, Any]:
    kind = number % KINDS
    content = f"Order {kind}: " + "one more espresso, " * (kind % 4)
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 60 + 10 * kind,
        "seed": kind,
        "logprobs": True,
        "extra_body": {"ignore_eos": True},
        **_SAMPLING[kind % len(_SAMPLING)],
    }


@contextlib.contextmanager
def client_of(server: Server) -> Iterator[openai.OpenAI]:
    """OpenAI's own client, which does not try again by itself."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=COMMAND_SECONDS) as client:
        yield client


@dataclass
class Load:
    """Streams that are being read. answers: by the numbers of their questions, complete once the load is over."""

    answers: dict[int, Answer] = field(default_factory=dict)
    tokens: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _ended: bool = False

    def token(self) -> None:
        with self._changed:
            self.tokens += 1
            self._changed.notify_all()

    def wait_tokens(self, count: int) -> None:
        """Return after so many more tokens, of all streams together."""
        goal = self.tokens + count
        with self._changed:
            assert self._changed.wait_for(lambda: self._ended or self.tokens >= goal, COMMAND_SECONDS)
            assert not self._ended, "a stream has failed"

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def longest_gap(self) -> float:
        return max(answer.longest_gap for answer in self.answers.values())

    @property
    def longest_to_first(self) -> float:
        return max(answer.to_first for answer in self.answers.values())

    def assert_same_cup(self, reference: Mapping[int, Answer]) -> None:
        """Every answer is the reference's, to the byte and the last bit of a logprob."""
        assert self.answers
        for number, answer in self.answers.items():
            assert answer == reference[number % KINDS]


@contextlib.contextmanager
def streams(server: Server) -> Iterator[Load]:
    """Eight streams at any moment inside. At the end the open ones are read to theirs; what failed is raised."""
    load, numbers, over = Load(), itertools.count(), threading.Event()

    def customer() -> None:
        try:
            while not over.is_set():
                number = next(numbers)
                load.answers[number] = ask(client, number, load.token)
        except BaseException:
            load.end()
            raise

    with client_of(server) as client, ThreadPoolExecutor(STREAMS) as executor:
        customers: list[Future[None]] = [executor.submit(customer) for _ in range(STREAMS)]
        try:
            yield load
        finally:
            over.set()
            for failed in [error for customer in customers if (error := customer.exception())]:
                raise failed


def local_answers(environment: Mapping[str, str], model: Path) -> dict[int, Answer]:
    """What a server without workers answers to each kind of question."""
    with Server(environment, model) as server, client_of(server) as client, ThreadPoolExecutor(STREAMS) as executor:
        return dict(enumerate(executor.map(lambda number: ask(client, number), range(KINDS))))
