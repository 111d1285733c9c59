"""`barista bench` against real servers on loopback: what it measures, how requests fail, what it prints where."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine, eventually, fake_app, served
from fake_openai import DONE, FakeOpenAI, answer, chunk, event, refusal, stream, usage
from fastapi import Response
from typer.testing import CliRunner, Result

from barista.errors import BaristaError
from router.bench.client import BenchClient, chat_body
from router.bench.record import Answer, Failure, Record
from router.cli import app

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:1"
FULL = refusal(503, {"error": {"message": "The queue is full."}})
FEW = ("--num-prompts", "3", "--duration", "5")


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[FakeOpenAI, str]]:
    fake = FakeOpenAI(story=lambda number, body: answer())
    with served(fake.app()) as url:
        yield fake, url


@pytest.fixture
def fake(running: tuple[FakeOpenAI, str]) -> FakeOpenAI:
    return running[0]


@pytest.fixture
def url(running: tuple[FakeOpenAI, str]) -> str:
    return running[1]


def bench(url: str, *arguments: str) -> Result:
    return CliRunner(env={"BARISTA_API_KEY": "", "COLUMNS": "120"}).invoke(app, ["bench", "--url", url, *arguments])


def report(url: str, *arguments: str) -> dict[str, Any]:
    done = bench(url, "--json", *arguments)
    assert done.exit_code == 0, done.exception
    return json.loads(done.stdout)


def error(result: Result) -> BaristaError:
    assert result.stdout == ""
    assert isinstance(result.exception, BaristaError)
    return result.exception


def ask(url: str, timeout: float = 5.0) -> Record:
    """One request."""

    async def one() -> Record:
        async with BenchClient(url, None, chat_body("espresso", 4), timeout) as client:
            return await client.ask("hello", time.perf_counter())

    return asyncio.run(one())


# ---------------------------------------------------------------- what is measured


def test_times_are_those_of_the_server(fake: FakeOpenAI, url: str) -> None:
    fake.tell(lambda number, body: answer(4, ttft=0.2, gap=0.1))
    record = ask(url)
    assert isinstance(record, Answer)
    assert (record.prompt_tokens, record.output_tokens, len(record.chunks)) == (9, 4, 4)
    for number, arrival in enumerate(record.chunks):  # never early; late by what a busy machine makes of it
        assert 0.2 + 0.1 * number <= arrival - record.start < 5.0
    assert record.e2el == pytest.approx(record.ttft + 3 * record.tpot)


def test_tokens_that_share_a_chunk_are_counted_by_the_server(fake: FakeOpenAI, url: str) -> None:
    tea = chunk(content=" tea tea tea")
    fake.tell(lambda number, body: stream(tea, 0.1, tea, 0.1, tea, usage(9, 9), DONE))
    record = ask(url)
    assert isinstance(record, Answer)
    assert record.tpot == pytest.approx((record.e2el - record.ttft) / 8)
    assert len(record.itl) == 2


def test_the_queue_of_a_slow_server_is_in_the_latency_of_an_open_loop(fake: FakeOpenAI, url: str) -> None:
    fake.tell(lambda number, body: answer(1, ttft=0.03))
    summary = report(url, "--rate", "500", "--max-in-flight", "1", "--num-prompts", "10", "--duration", "5")
    assert summary["ttft_ms"]["max"] > 10 * 30 * 0.9
    assert summary["lag_ms"]["max"] > 9 * 30 * 0.9
    assert summary["tpot_ms"] is None


# ---------------------------------------------------------------- how requests fail


@pytest.mark.parametrize(
    ("response", "kind", "words"),
    [
        (FULL, "http_503", "The queue is full."),
        (refusal(500, {"object": "error", "message": "boom"}), "http_500", "boom"),
        (stream(chunk(content="a"), ConnectionResetError()), "broken_stream", "broke"),
        (stream(chunk(content="a")), "broken_stream", "before it was complete"),
        (stream(chunk(content="a"), event({"error": {"message": "A worker died."}})), "error_event", "A worker died."),
        (refusal(200, {"choices": [{"message": {"content": "whole"}}]}), "bad_answer", "no stream"),
        (stream(usage(9, 0), DONE), "empty", "no text"),
        (stream(chunk(content="a"), 1.0, DONE), "timeout", "within 0.2 s"),
        (stream(1.0, DONE), "timeout", "within 0.2 s"),
    ],
)
def test_a_request_that_fails_has_a_kind_and_the_servers_words(
    fake: FakeOpenAI, url: str, response: Response, kind: str, words: str
) -> None:
    fake.tell(lambda number, body: response)
    record = ask(url, timeout=0.2 if kind == "timeout" else 5.0)
    assert isinstance(record, Failure)
    assert record.kind == kind
    assert words in record.message


def test_failures_are_counted_and_the_rest_is_measured(fake: FakeOpenAI, url: str) -> None:
    fake.tell(lambda number, body: FULL if number % 3 == 2 else answer(4))
    summary = report(url, "--num-prompts", "6", "--duration", "5", "--goodput", "e2el:60000")
    assert (summary["completed"], summary["failed"], summary["failures"]) == (4, 2, {"http_503": 2})
    assert summary["goodput_share"] == pytest.approx(4 / 6)


def test_if_every_request_fails_the_first_says_why(fake: FakeOpenAI, url: str) -> None:
    fake.tell(lambda number, body: FULL if number else answer())
    failed = error(bench(url, "--json", *FEW))
    assert failed.message == "All 3 requests failed; the first: The queue is full."
    assert failed.remedy == "Try again in a moment."


def test_a_server_that_does_not_answer_one_request_gets_no_load(fake: FakeOpenAI, url: str) -> None:
    fake.tell(lambda number, body: refusal(404, {"error": {"message": "There is no model decaf."}}))
    assert error(bench(url)).message == "There is no model decaf."
    assert len(fake.bodies) == 1


@pytest.mark.parametrize("arguments", [(), ("--model", "espresso")])
@pytest.mark.parametrize("address", [NOWHERE, "no url", "http://", "http://127.0.0.1:port"])
def test_a_server_that_is_not_there_is_an_error(address: str, arguments: tuple[str, ...]) -> None:
    failed = error(bench(address, *arguments))
    assert address.rstrip("/") in failed.message
    assert failed.remedy == "Is the server running there?"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": {"message": "Unrecognized request argument supplied: ignore_eos"}}),
        (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "ignore_eos"], "input": True}]}),
    ],
)
def test_a_field_that_the_server_refuses_is_named_and_can_be_left_out(
    fake: FakeOpenAI, url: str, status: int, body: object
) -> None:
    fake.tell(lambda number, sent: refusal(status, body) if "ignore_eos" in sent else answer())
    failed = error(bench(url, *FEW))
    assert failed.message.startswith("The server refuses ignore_eos: ")
    assert failed.remedy == "Try --omit ignore_eos."
    assert report(url, "--omit", "ignore_eos", *FEW)["completed"] == 3


@pytest.mark.parametrize(
    "arguments", [["--rate", "1", "--concurrency", "1"], ["--rate", "0"], ["--rate", "nan"], ["--duration", "inf"]]
)
def test_wrong_usage_ends_with_status_2(arguments: list[str]) -> None:
    assert bench(NOWHERE, *arguments).exit_code == 2


def test_a_run_in_which_nothing_arrives_is_an_error(fake: FakeOpenAI, url: str) -> None:
    fake.tell(lambda number, body: answer())
    assert "--rate" in error(bench(url, "--rate", "0.001", "--duration", "0.1")).remedy


# ---------------------------------------------------------------- what is sent, and what is printed


def test_the_same_load_is_sent_for_the_same_seed(fake: FakeOpenAI, url: str) -> None:
    fake.tell(lambda number, body: answer(), counts=lambda text: 20 + len(text.split()))
    for seed in ("1", "1", "2"):
        report(url, "--seed", seed, "--input-len", "50", "--output-len", "6", *FEW)
    first, again, other = (fake.bodies[i : i + 4] for i in (0, 4, 8))
    assert first == again != other
    fields = {name: value for name, value in first[0].items() if name != "messages"}
    assert fields == {
        "model": "espresso", "stream": True, "max_tokens": 6, "ignore_eos": True, "temperature": 0,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    contents = [body["messages"][0]["content"] for body in first]
    assert [len(content.split()) for content in contents] == [30] * 4
    assert len(set(contents)) == 4


def test_barista_takes_the_whole_load() -> None:
    engine = FakeEngine(max_model_len=4096, kv_capacity_tokens=1 << 20)
    keys = (hashlib.sha256(b"secret").digest(),)
    lengths = ("--input-len", "900", "--output-len", "30")
    with served(fake_app(engine, api_keys=keys)) as url:
        assert "--api-key" in error(bench(url)).remedy
        summary = report(f"{url}/v1", "--api-key", "secret", "--rate", "200", *lengths, *FEW)
    assert summary["settings"]["model"] == "house-blend"
    assert (summary["completed"], summary["failed"]) == (3, 0)
    assert summary["total_output_tokens"] == 90
    assert summary["total_input_tokens"] / 3 == pytest.approx(900, rel=0.05)
    assert summary["counted_by"] == "usage"
    assert all(submit.sampling.ignore_eos for submit in engine.submitted)


def test_people_get_a_table(fake: FakeOpenAI, url: str) -> None:
    fake.tell(lambda number, body: answer(4, gap=0.01))
    done = bench(url, "--concurrency", "2", "--goodput", "ttft:60000", *FEW)
    assert done.exit_code == 0
    assert "Closed loop, 2 at a time" in done.stdout
    for name in ("TTFT", "TPOT", "ITL", "E2EL"):
        assert f"({name})" in done.stdout
    assert "3 answered, 0 failed" in done.stdout
    assert "9.0 in, 4.0 out per request, counted by usage, 1.00 per chunk" in done.stdout
    assert "100.0% with ttft <= 60000 ms" in done.stdout
    assert "sent late by" not in done.stdout


def test_ctrl_c_prints_what_has_been_measured(fake: FakeOpenAI, url: str) -> None:
    fake.tell(lambda number, body: answer(2) if number < 4 else stream(60.0, DONE))
    process = subprocess.Popen(
        [sys.executable, "-m", "router.cli", "bench", "--url", url, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert eventually(lambda: len(fake.bodies) == 5, seconds=20)
        process.send_signal(signal.SIGINT)
        shown, errors = process.communicate(timeout=10)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "Traceback" not in errors
    summary = json.loads(shown)
    assert summary["interrupted"]
    assert (summary["completed"], summary["failed"]) == (3, 0)
