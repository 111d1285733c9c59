"""status, drain, scale and rebalance: what they print, what they ask for, and what they say when refused."""

from __future__ import annotations

import copy
import hashlib
import io
import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from fake_controller import FakeController, fake_controller
from fake_engine import FakeEngine, fake_app, served
from rich.console import Console
from typer.testing import CliRunner, Result

from barista.errors import BaristaError
from barista.v1 import controller_pb2 as pb
from router.cli import app
from router.commands import status
from router.messages import LinkStats, PoolStats
from router.pool_table import HEADER, changes, rows, summary

LINKS = (LinkStats("worker-0", "shm", "ready", 10, 60, 0, 0, 0.5), LinkStats("worker-1", "grpc", "ready", 10, 20))


def engine() -> FakeEngine:
    return FakeEngine(pool=PoolStats(epoch=3, links=LINKS))


@pytest.fixture(scope="module")
def controller() -> Iterator[FakeController]:
    with fake_controller() as controller:
        yield controller


@pytest.fixture(scope="module")
def url(controller: FakeController) -> Iterator[str]:
    with served(fake_app(engine(), pool=controller.client())) as url:
        yield url


def barista(*arguments: str) -> Result:
    return CliRunner(env={"BARISTA_API_KEY": ""}).invoke(app, list(arguments))


def test_status_shows_each_worker_to_people(url: str) -> None:
    lines = barista("status", "--url", url).stdout.splitlines()
    assert "epoch 3, coverage 100.0%, 0 experts uncovered, 5 moves" in lines[0]
    assert lines[1].split() == list(HEADER)
    assert lines[2].split() == [
        "worker-0", "ready", "100", "127.0.0.1:7000", "here", "2.0", "kB", "of", "4.0", "kB", "2", "shm", "60", "75%",
        "50.00", "ms",
    ]  # fmt: skip
    assert lines[3].startswith("worker-1 ")


def test_status_as_json_is_json_alone(url: str) -> None:
    report = json.loads(barista("status", "--json", "--url", f"{url}/v1").stdout)
    assert [worker["name"] for worker in report["workers"]] == ["worker-0", "worker-1"]
    assert (report["epoch"], report["coverage"]) == (3, 1.0)


def test_without_workers_status_says_where_the_experts_are() -> None:
    with served(fake_app()) as url:
        assert barista("status", "--url", url).stdout == (
            "There is no pool: the experts are in the engine, or on workers of its own on GPUs.\n"
        )
        assert json.loads(barista("status", "--json", "--url", url).stdout)["workers"] == []


def test_status_is_shown_or_watched_or_json() -> None:
    assert barista("status", "--json", "--watch").exit_code == 2


def test_drain_scale_and_rebalance_say_what_was_done(controller: FakeController, url: str) -> None:
    controller.calls.clear()
    assert "worker-1 is drained" in barista("drain", "worker-1", "--url", url).stdout
    assert barista("scale", "3", "--url", url).stdout == "The pool has 3 workers.\n"
    lines = barista("rebalance", "--dry-run", "--url", url).stdout.splitlines()
    assert lines[0] == "1 move planned, none made; busiest over average worker: 1.50, then 1.25."
    assert [line.split() for line in lines[1:]] == [["LAYER", "EXPERT", "FROM", "TO"], ["1", "0", "-", "worker-1"]]
    assert controller.calls == [
        pb.DrainWorkerRequest(worker="worker-1"), pb.ScaleRequest(workers=3), pb.RebalanceRequest(dry_run=True)
    ]  # fmt: skip


@pytest.mark.parametrize("command", [("drain", "worker-1"), ("scale", "3"), ("rebalance",)])
def test_every_command_prints_json_alone_if_asked(url: str, command: tuple[str, ...]) -> None:
    assert isinstance(json.loads(barista(*command, "--json", "--url", url).stdout), dict)


def test_a_refusal_is_an_error_in_the_controllers_words(controller: FakeController, url: str) -> None:
    controller.refusal = grpc.StatusCode.NOT_FOUND, "There is no worker-9. There are worker-0 and worker-1."
    try:
        error = barista("drain", "worker-9", "--url", url).exception
    finally:
        controller.refusal = None
    assert isinstance(error, BaristaError)
    assert error.message == "There is no worker-9. There are worker-0 and worker-1."


@pytest.mark.parametrize("command", [("status",), ("drain", "worker-1"), ("scale", "3"), ("rebalance",)])
def test_where_no_server_answers_the_remedy_says_so(command: tuple[str, ...]) -> None:
    error = barista(*command, "--url", "http://127.0.0.1:1").exception
    assert isinstance(error, BaristaError)
    assert "http://127.0.0.1:1" in error.message
    assert error.remedy == "Is the server running there?"


def test_the_admin_key_is_sent(controller: FakeController) -> None:
    admin = (hashlib.sha256(b"boss").digest(),)
    with served(fake_app(engine(), pool=controller.client(), admin_keys=admin)) as url:
        error = barista("scale", "3", "--url", url).exception
        assert isinstance(error, BaristaError)
        assert "admin key" in error.message
        assert barista("scale", "3", "--url", url, "--api-key", "boss").exit_code == 0


def report(*workers: dict[str, Any], epoch: int = 1, **fields: Any) -> dict[str, Any]:
    empty = {
        "pid": 1, "address": "", "node": "", "state": "ready", "bytes": 0, "capacity_bytes": 0, "transport": None,
        "rows": 0, "dispatches": 0, "latency_ms": 0.0, "detail": "",
    }  # fmt: skip
    return {
        "epoch": epoch, "coverage": 1.0, "workers": [empty | worker for worker in workers], "experts_uncovered": 0,
        "moves": 0, "resends": 0, "hedges": 0, "imbalance": 1.0, "problem": "", "pool": "", **fields,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {}, []),
        ({}, {"state": "lost", "detail": "SIGKILL"}, ["w was ready, is lost: SIGKILL"]),
        ({"pid": 1}, {"pid": 2}, ["w died and is back: process 1, now 2"]),
    ],
)
def test_what_happens_to_a_worker_is_an_event(before: Any, after: Any, expected: list[str]) -> None:
    assert changes(report({"name": "w"} | before), report({"name": "w"} | after)) == expected


def test_workers_that_come_and_go_are_events_and_so_is_a_new_epoch() -> None:
    events = changes(report({"name": "worker-0"}), report({"name": "worker-1"}, epoch=2))
    assert events == ["worker-0 is gone", "worker-1 has come, ready", "epoch 2, coverage 100.0%"]


def test_a_report_does_not_differ_from_itself() -> None:
    one = report({"name": "worker-0"}, {"name": "worker-1", "state": "lost"})
    assert changes(one, copy.deepcopy(one)) == []


def test_a_worker_of_which_little_is_known_has_a_row() -> None:
    assert rows(report({"name": "worker-0"}))[0][:4] == ("worker-0", "ready", "1", "-")
    assert summary(report(problem="Two workers are missing.")).endswith("\nTwo workers are missing.")


class Server:
    """Gives one answer after another; an exception is raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def get(self, path: str) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def test_watch_shows_deaths_and_outlasts_a_silent_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "REFRESH_SECONDS", 0)
    silent = BaristaError("Cannot talk to it.")
    lost = report({"name": "worker-0", "state": "lost"})
    console = Console(record=True, force_terminal=True, width=160, file=io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        status._watch(Server(silent, silent, lost, KeyboardInterrupt()), report({"name": "worker-0"}), console)
    shown = console.export_text().splitlines()
    ending = "\n".join(shown[-6:])
    assert ending.count("Cannot talk to it.") == 1
    assert "worker-0 was ready, is lost" in ending
