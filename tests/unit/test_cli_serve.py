"""`barista serve` and `barista chat` with a real engine on a tiny model, and that nothing outlives them."""

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

import grpc
import httpx
import psutil
import pytest
import torch
from tiny_model import write_tiny_model

from barista.v1.router_pb2 import Chat, ChatMessage, GenerateRequest
from barista.v1.router_pb2_grpc import RouterStub

ROOT = Path(__file__).parents[2]
SECONDS = 120  # the first start may compile the kernels


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def start(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "router.cli", *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
    )  # fmt: skip


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], dict[str, str], psutil.Process]]:
    """A ready server: its process, the JSON that it printed, and its engine's process."""
    process = start("serve", *arguments, "--port", 0, "--json")
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        ready = process.stdout.readline()
        assert ready, process.stderr.read()
        (engine,) = psutil.Process(process.pid).children()
        yield process, json.loads(ready), engine
    finally:
        process.kill()
        process.communicate()


def gone(engine: psutil.Process, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_ready_server_answers_and_on_sigint_takes_its_engine_with_it(model: Path) -> None:
    with serving(model, "--grpc-port", 0) as (process, ready, engine):
        assert ready["model"] == "tiny"
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "seed": 1}
        answer = httpx.post(ready["url"] + "/v1/chat/completions", json=body, trust_env=False, timeout=30)
        assert answer.status_code == 200
        with grpc.insecure_channel(ready["grpc"]) as channel:
            chat = Chat(messages=[ChatMessage(role="user", content="hi")])
            replies = RouterStub(channel).Generate(GenerateRequest(chat=chat, max_tokens=3, seed=1), timeout=30)
            text = "".join(reply.text for reply in replies)
        assert text == answer.json()["choices"][0]["message"]["content"]
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
        assert process.returncode == 0
        assert output == ""
        assert "Traceback" not in errors
        assert gone(engine)


def test_an_engine_whose_server_is_killed_ends_by_itself(model: Path) -> None:
    with serving(model) as (process, _, engine):
        process.kill()
        assert gone(engine)


def test_a_server_whose_engine_is_killed_ends_with_an_error(model: Path) -> None:
    with serving(model) as (process, _, engine):
        engine.kill()
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 1
        assert "error: The engine died" in errors
        assert "Traceback" not in errors


def test_a_configuration_file_with_keys_does_not_lock_chat_out_of_its_own_server(model: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret")
    (tmp_path / "barista.toml").write_text(f"api_key_file = '{tmp_path / 'keys'}'")
    process = start("chat", model, "--max-tokens", 3, BARISTA_CONFIG=str(tmp_path / "barista.toml"))
    output, errors = process.communicate("hello\n", timeout=SECONDS)
    assert process.returncode == 0, errors
    assert output


def test_chat_answers_each_line_of_a_pipe_and_leaves_no_process(model: Path) -> None:
    process = start("chat", model, "--max-tokens", 3, "--temperature", 0)
    time.sleep(1)
    family = psutil.Process(process.pid).children(recursive=True)
    output, errors = process.communicate("hello\n/clear\nhello\n/exit\nnever said\n", timeout=SECONDS)
    assert process.returncode == 0, errors
    half = len(output) // 2
    assert output
    assert output[:half] == output[half:]  # the history was forgotten in between, so both answers are the same
    assert all(gone(child) for child in family)


def test_a_model_that_cannot_be_loaded_is_an_error_with_the_engines_reason(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    process = start("serve", folder, "--port", 0)
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert output == ""
    assert "model.layers.2." in errors
    assert "Traceback" not in errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_device_cuda_says_what_is_missing(model: Path) -> None:
    process = start("serve", model, "--port", 0, "--device", "cuda")
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert output == ""
    assert "error: device is 'cuda', but" in errors
    assert "--device cpu" in errors
    assert "Traceback" not in errors
