"""`barista engine` and `barista serve --engines` as their users meet them: real processes, real signals, mutual TLS."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from tests.distributed.certificates import certificates
from tests.e2e.pool_server import ROOT, barista, isolated
from tests.unit.tiny_model import write_tiny_model

pytestmark = pytest.mark.alone

START_SECONDS = 60.0
TOKENS = 200


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in socks]


class Apart:
    """Two engines and an API of a tiny model."""

    def __init__(self, folder: Path) -> None:
        self.model = folder / "model"
        write_tiny_model(self.model)
        self.tls = certificates(folder / "tls")
        self.environ = isolated(folder, BARISTA_POOL_TOKEN="of-the-test")
        self.ports = free_ports(3)
        self.engines: list[subprocess.Popen[bytes]] = []
        self.api: subprocess.Popen[bytes] | None = None
        self._folder = folder

    def start(self) -> None:
        self.engines = [self.engine(number) for number in range(2)]
        addresses = ",".join(f"127.0.0.1:{port}" for port in self.ports[:2])
        self.api = self._spawn("api", "serve", self.model, "--port", self.ports[2], "--engines", addresses)
        self.wait_ready()

    def engine(self, number: int) -> subprocess.Popen[bytes]:
        return self._spawn(
            f"engine-{number}", "engine", self.model, "--threads", 1, "--port", self.ports[number],
            "--kv-cache-tokens", 8192, "--drain-timeout", 1,
        )  # fmt: skip

    def _spawn(self, name: str, *arguments: object) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                barista(*arguments, "--tls-dir", self.tls), env=self.environ, cwd=ROOT, stdout=log, stderr=log
            )

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{self.ports[2]}/ready", trust_env=False).is_success:
                    return
            assert time.monotonic() < deadline, self.log("api")
            time.sleep(0.1)

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()

    def close(self) -> None:
        for process in [*self.engines, self.api]:
            if process is not None:
                process.kill()
                process.wait()

    def ask(self, number: int, begun: threading.Event) -> tuple[str, object]:
        text, usage = "", None
        with openai.OpenAI(base_url=f"http://127.0.0.1:{self.ports[2]}/v1", api_key="none", max_retries=0) as client:
            for chunk in client.completions.create(
                model="model", prompt=f"cup {number}", max_tokens=TOKENS, temperature=1.0, seed=number,
                extra_body={"ignore_eos": True}, stream=True, stream_options={"include_usage": True},
            ):  # fmt: skip
                begun.set()
                text += chunk.choices[0].text if chunk.choices else ""
                usage = chunk.usage or usage
        assert usage is not None
        return text, (usage.prompt_tokens, usage.completion_tokens)

    def ask_all(self, meanwhile: threading.Thread | None = None) -> list[tuple[str, object]]:
        begun = [threading.Event() for _ in range(6)]
        with ThreadPoolExecutor(6) as executor:
            answers = [executor.submit(self.ask, number, event) for number, event in enumerate(begun)]
            for event in begun:
                assert event.wait(30)
            if meanwhile is not None:
                meanwhile.start()
            return [answer.result() for answer in answers]


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    made = Apart(tmp_path_factory.mktemp("apart"))
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def answers(apart: Apart) -> list[tuple[str, object]]:
    return apart.ask_all()


@pytest.mark.parametrize("sent", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_answers_outlive_an_engine(apart: Apart, answers: list[tuple[str, object]], sent: signal.Signals) -> None:
    """Drawn tokens are kept, so the usage counts each of them once."""
    for number in (0, 1) if sent == signal.SIGTERM else (0,):
        hit = threading.Thread(target=apart.engines[number].send_signal, args=(sent,))
        passed_on = apart.log("api").count("has let go of a request")
        assert apart.ask_all(hit) == answers
        assert apart.log("api").count("has let go of a request") > passed_on or sent == signal.SIGTERM
        status = apart.engines[number].wait(20)
        assert status == (0 if sent == signal.SIGTERM else -sent), apart.log(f"engine-{number}")
        apart.engines[number] = apart.engine(number)
        deadline = time.monotonic() + START_SECONDS
        while apart.log(f"engine-{number}").count("Ready") < apart.log(f"engine-{number}").count("Loading"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1.5)  # the API looks for it once a second


def test_answers_wait_for_the_only_engine_to_be_started_again(apart: Apart, answers: list[tuple[str, object]]) -> None:
    apart.engines[1].kill()
    apart.engines[1].wait()
    time.sleep(0.5)

    def replace() -> None:
        apart.engines[0].kill()
        apart.engines[0].wait()
        apart.engines[0] = apart.engine(0)

    assert apart.ask_all(threading.Thread(target=replace)) == answers


@pytest.mark.long
def test_an_engine_that_hangs_is_told_by_ready_and_not_by_live(apart: Apart) -> None:
    children = subprocess.run(
        ["pgrep", "-P", str(apart.engines[0].pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    url = f"http://127.0.0.1:{apart.ports[2]}"
    for child in children:
        os.kill(int(child), signal.SIGSTOP)
    try:
        assert httpx.get(url + "/ready", trust_env=False, timeout=10).status_code == 503
        assert httpx.get(url + "/live", trust_env=False, timeout=10).status_code == 200
    finally:
        for child in children:
            os.kill(int(child), signal.SIGCONT)
    apart.wait_ready()


def test_without_the_certificates_nobody_attaches(apart: Apart, tmp_path: Path) -> None:
    others = certificates(tmp_path / "others")
    with (tmp_path / "log").open("wb") as log:
        stranger = subprocess.Popen(
            barista(
                "serve", apart.model, "--port", free_ports(1)[0], "--tls-dir", others,
                "--engines", f"127.0.0.1:{apart.ports[0]}",
            ),
            env=apart.environ, cwd=ROOT, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_SECONDS
        while "There is no engine yet" not in (said := (tmp_path / "log").read_text()):
            assert stranger.poll() is None
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        assert f"127.0.0.1:{apart.ports[0]}: UNAVAILABLE" in said
        assert "CERTIFICATE_VERIFY_FAILED" in said
        assert "Ready" not in said
    finally:
        stranger.kill()
        stranger.wait()
