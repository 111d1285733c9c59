"""How a server ends: at once, after its streams, or with its engine. Real processes, real signals, a fake engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

HERE = Path(__file__).parent
BODY = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 20}


class Running:
    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "fake_server.py"), *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{self.process.stdout.readline().strip()}"

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def end(self, seconds: float = 5.0) -> tuple[int, str]:
        """Exit status and standard error."""
        _, errors = self.process.communicate(timeout=seconds)
        return self.process.returncode, errors


@contextmanager
def running(*arguments: object) -> Iterator[Running]:
    server = Running(*arguments)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


def read_events(lines: Iterator[str]) -> list[str]:
    return [line.removeprefix("data: ") for line in lines if line]


def has_error(events: list[str]) -> bool:
    return events[-1] != "[DONE]" and "error" in json.loads(events[-1])


def order(server: Running, text: str) -> None:
    assert server.process.stdin is not None
    server.process.stdin.write(f"{text}\n")
    server.process.stdin.flush()


def gone(process: psutil.Process, seconds: float = 5.0) -> bool:
    """Whether it ends in time; a zombie has ended."""
    deadline = time.monotonic() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_the_api_says_that_it_is_not_ready_while_the_engine_loads() -> None:
    with running(0, 5, 3) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        assert client.post("/v1/chat/completions", json=BODY).status_code == 503


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_server_ends_promptly_and_quietly(sig: signal.Signals) -> None:
    with running(0, 30) as server:
        server.wait_ready()
        started = time.monotonic()
        server.process.send_signal(sig)
        status, errors = server.end()
        assert status == 0
        assert "Traceback" not in errors
        assert time.monotonic() - started < 2


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_still_loads_ends_promptly_and_quietly(sig: signal.Signals) -> None:
    with running(0, 30, 60) as server:
        assert httpx.get(server.url + "/health", trust_env=False).status_code == 200
        server.process.send_signal(sig)
        status, errors = server.end()
        assert status == 0
        assert "Traceback" not in errors


def test_sigterm_lets_open_streams_finish_and_refuses_new_requests() -> None:
    with running(0.05, 30) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        server.wait_ready()
        with client.stream("POST", "/v1/chat/completions", json=BODY) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            assert httpx.get(server.url + "/ready", trust_env=False).status_code == 503
            assert httpx.post(server.url + "/v1/chat/completions", json=BODY, trust_env=False).status_code == 503
            assert read_events(lines)[-1] == "[DONE]"
        assert server.end()[0] == 0


def test_a_stream_longer_than_the_drain_time_ends_with_an_error_event() -> None:
    with running(0.2, 0.3) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        server.wait_ready()
        with client.stream("POST", "/v1/chat/completions", json=BODY) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert has_error(read_events(lines))
        status, errors = server.end()
        assert status == 0
        assert "Traceback" not in errors


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGINT],
        [signal.SIGTERM, signal.SIGTERM],
        pytest.param([signal.SIGTERM, signal.SIGINT], marks=pytest.mark.long),
    ],
)
def test_sigint_and_a_second_signal_end_open_streams_at_once(signals: list[signal.Signals]) -> None:
    with running(0.2, 30) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        server.wait_ready()
        with client.stream("POST", "/v1/chat/completions", json=BODY) as response:
            lines = response.iter_lines()
            next(lines)
            for sig in signals:
                server.process.send_signal(sig)
                time.sleep(0.2)
            assert has_error(read_events(lines))
        status, errors = server.end(3)
        assert status == 0
        assert "Traceback" not in errors


def test_when_the_engine_dies_streams_fail_and_the_server_ends_with_an_error() -> None:
    with running(0.1, 30) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        server.wait_ready()
        with client.stream("POST", "/v1/chat/completions", json=BODY) as response:
            lines = response.iter_lines()
            next(lines)
            order(server, "die")
            assert has_error(read_events(lines))
        status, errors = server.end()
        assert status == 1
        assert "error: The engine died" in errors
        assert "Traceback" not in errors


def test_a_pool_that_fails_while_the_engine_waits_for_it_ends_the_start() -> None:
    with running(0, 30, 60, "fatal later") as server:
        status, errors = server.end()
        assert status == 1
        assert "error: The Ray cluster at 10.0.0.9:6379 does not answer." in errors
        assert "Start one." in errors
        assert "Traceback" not in errors


def test_a_server_whose_own_pool_has_died_ends_with_an_error() -> None:
    with running(0.1, 30, 0, "own") as server:
        server.wait_ready()
        order(server, "keeper")
        status, errors = server.end()
        assert status == 1
        assert "error: The pool's keeper died" in errors
        assert "Traceback" not in errors


def test_a_server_of_a_named_pool_goes_on_without_its_keeper() -> None:
    with running(0.01, 30, 0, "named") as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        server.wait_ready()
        (keeper,) = psutil.Process(server.process.pid).children()
        order(server, "keeper")
        assert gone(keeper)
        assert client.post("/v1/chat/completions", json=BODY | {"stream": False}).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        status, errors = server.end()
        assert status == 0
        assert "its workers go on" in errors


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_server_takes_its_keeper_with_it(sig: signal.Signals) -> None:
    with running(0, 30, 0, "own") as server:
        server.wait_ready()
        (keeper,) = psutil.Process(server.process.pid).children()
        server.process.send_signal(sig)
        assert server.end()[0] == 0
        assert not keeper.is_running()


def test_a_keeper_whose_server_is_killed_hears_of_it() -> None:
    with running(0, 30, 0, "own") as server:
        server.wait_ready()
        (keeper,) = psutil.Process(server.process.pid).children()
        server.process.kill()
        assert gone(keeper)


def test_an_http_server_that_ends_by_itself_is_an_error() -> None:
    with running(0.1, 30) as server:
        server.wait_ready()
        order(server, "http")
        status, errors = server.end()
        assert status == 1
        assert "error: The HTTP server ended by itself" in errors
        assert "Traceback" not in errors
