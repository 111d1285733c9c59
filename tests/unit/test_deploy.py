"""`barista deploy`: which job is to run, what it is told, and what a cluster that does not answer leads to."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import FastAPI, Request, Response
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import GetTimeoutError, RayError
from typer.testing import CliRunner

from barista.config import ServeConfig, load
from barista.errors import ConfigError
from barista.trust import TOKEN_VARIABLE
from experts.cluster import engines as engines_module
from experts.cluster.deployment import PATIENCE_SECONDS, next_count, unheeded
from experts.cluster.engines import RayEngines
from experts.cluster.messages import PoolConfig
from router.deploy import Action, Deployer, next_action, order_of
from router.deployment import engine_command, flags, require_deployable
from router.engine_sources import engine_source
from router.ray_api import Job, RayApi
from tests.unit.fake_engine import served

ORDER = "barista keep house-blend --pool bar --workers 2"
STATUSES = ("PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED")


def job(submission_id: str, status: str = "RUNNING") -> Job:
    return Job(submission_id, status, "")


def settle(jobs: list[Job], order: str) -> list[Job]:
    """Do as told until there is nothing to do; every stop and every start comes true."""
    for _ in range(10):
        action = next_action(jobs, "bar", order)
        if action == Action():
            return jobs
        jobs = [job(entry.submission_id, "STOPPED") if entry.submission_id in action.stop else entry for entry in jobs]
        if action.submit:
            assert action.submit not in [entry.submission_id for entry in jobs]
            jobs.append(job(action.submit))
    raise AssertionError(f"it never settles: {jobs}")


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b"]), st.integers(1, 20), st.sampled_from(STATUSES)),
        max_size=6,
        unique_by=lambda entry: entry[1],
    )
)
def test_one_job_of_the_order_runs_in_the_end_and_none_of_another(past: list[tuple[str, int, str]]) -> None:
    marks = {order: next_action([], "bar", order).submit.split("-")[2] for order in ("a", "b")}
    jobs = [job(f"barista-bar-{marks[order]}-{number}", status) for order, number, status in past]
    strangers = [job("barista-baroque-12345678-1"), job("somebody-elses")]
    running = [entry.submission_id for entry in settle(jobs + strangers, "a") if not entry.is_over]
    ours = [name for name in running if name.startswith("barista-bar-")]
    already = [entry for entry in jobs if not entry.is_over and marks["a"] in entry.submission_id]
    assert len(ours) == max(1, len(already))
    assert all(marks["a"] in name for name in ours)
    assert {entry.submission_id for entry in strangers} <= set(running)


def test_pools_whose_names_begin_alike_do_not_stop_each_others_jobs() -> None:
    other = next_action([], "bar-2", "another order").submit
    assert next_action([job(other)], "bar", ORDER) == next_action([], "bar", ORDER)


CONFIGS = st.builds(
    ServeConfig,
    model=st.sampled_from(["house-blend", "owner/name", "/models/a b"]),
    workers=st.integers(0, 9),
    pool=st.none() | st.sampled_from(["bar", "b-1"]),
    max_model_len=st.none() | st.integers(1, 9000),
    drain_timeout=st.floats(0, 100),
    format=st.sampled_from(["auto", "int8"]),
    tls_dir=st.none() | st.just(Path("/etc/barista/tls")),
    log_level=st.sampled_from(["info", "debug"]),
    threads=st.integers(1, 64),
)


@given(CONFIGS)
def test_a_command_line_gives_the_configuration_back(config: ServeConfig) -> None:
    model, *words = flags(config)
    given = {
        name.removeprefix("--").replace("-", "_"): text for name, text in zip(words[::2], words[1::2], strict=True)
    }
    environ = {f"BARISTA_{name.upper()}": text for name, text in given.items()}
    assert load(None, environ, {"model": model}) == config


def test_an_engine_is_told_what_is_its_own() -> None:
    config = ServeConfig(pool="bar", workers=4, redundancy=3, max_num_seqs=8, tls_dir=Path("/tls"))
    assert shlex.join(engine_command(config, 50051)) == (
        "barista engine house-blend --tls-dir /tls --max-num-seqs 8 --port 50051"
    )


@pytest.mark.parametrize("changes", [{"pool": None}, {"workers": 0}])
def test_a_deployment_has_a_pool_with_a_name_and_workers(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--pool NAME, --workers N"):
        require_deployable(ServeConfig(**({"pool": "bar", "workers": 2} | changes)), 1)


@given(st.integers(0, 9), st.integers(1, 9), st.integers(0, 12), st.floats(0, 1000))
def test_workers_go_only_because_fewer_are_wanted_and_come_where_there_is_room(
    now: int, wanted: int, places: int, unchanged: float
) -> None:
    count = next_count(now, wanted, places, unchanged)
    assert count >= min(now, wanted)
    assert count <= max(now, min(wanted, places)) or places >= wanted
    if places >= wanted:
        assert count == wanted
    if unchanged >= PATIENCE_SECONDS and now <= wanted:
        assert count >= min(wanted, places)


class Dashboard:
    """A Ray dashboard's part that is used, at a URL of its own. ends: the status that a submitted job has."""

    def __init__(self, ends: str = "RUNNING", token: str = "ray-token") -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.submitted: list[dict[str, Any]] = []
        self.app = FastAPI()

        @self.app.middleware("http")
        async def check(request: Request, call_next: Any) -> Response:
            if request.headers.get("authorization") != f"Bearer {token}":
                return Response("Unauthorized", 401)
            return await call_next(request)

        @self.app.get("/api/jobs/")
        def jobs() -> list[dict[str, Any]]:
            return [*self.jobs.values(), {"submission_id": None, "status": "RUNNING", "type": "DRIVER"}]

        @self.app.post("/api/jobs/")
        async def submit(request: Request) -> dict[str, str]:
            body = json.loads(await request.body())
            self.submitted.append(body)
            self.jobs[body["submission_id"]] = {"submission_id": body["submission_id"], "status": ends, "message": "m"}
            return {"submission_id": body["submission_id"]}

        @self.app.post("/api/jobs/{name}/stop")
        def stop(name: str) -> dict[str, bool]:
            self.jobs[name]["status"] = "STOPPED"
            return {"stopped": True}

        @self.app.get("/api/jobs/{name}/logs")
        def logs(name: str) -> dict[str, str]:
            return {"logs": "first\nthe reason\n"}

        @self.app.get("/api/v0/nodes")
        def nodes() -> dict[str, Any]:
            found = [("10.0.0.2", "ALIVE"), ("10.0.0.1", "ALIVE"), ("10.0.0.3", "DEAD")]
            return {"data": {"result": {"result": [{"node_ip": ip, "state": state} for ip, state in found]}}}


ENVIRON = {"RAY_AUTH_TOKEN": "ray-token"}


def deployer(url: str, order: str = ORDER, environ: dict[str, str] = ENVIRON) -> Deployer:
    return Deployer(RayApi(url, environ), "bar", order, {TOKEN_VARIABLE: "pool-token"})


def test_the_job_is_submitted_once_and_replaced_when_the_order_changes(capsys: pytest.CaptureFixture[str]) -> None:
    dashboard = Dashboard()
    with served(dashboard.app) as url:

        async def body() -> None:
            one = deployer(url)
            for now in range(3):
                await one.look(float(now))
            assert len(dashboard.submitted) == 1
            other = deployer(url, ORDER + " --workers 3")
            for now in range(3):
                await other.look(float(now))

        asyncio.run(body())
    first, second = dashboard.submitted
    assert first["entrypoint"] == ORDER
    assert first["runtime_env"] == {"env_vars": {TOKEN_VARIABLE: "pool-token"}}
    assert second["entrypoint"].endswith("--workers 3")
    states = [dashboard.jobs[body["submission_id"]]["status"] for body in (first, second)]
    assert states == ["STOPPED", "RUNNING"]


def test_a_job_that_fails_is_tried_again_ever_more_slowly_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    dashboard = Dashboard(ends="FAILED")
    with served(dashboard.app) as url:

        async def body() -> None:
            one = deployer(url)
            for now in range(100):
                await one.look(float(now))

        asyncio.run(body())
    assert 5 <= len(dashboard.submitted) <= 9
    assert "the reason" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environ", "says"),
    [({"RAY_AUTH_TOKEN": "wrong"}, "refuses this token"), ({}, "refuses this token"), (None, "does not answer")],
)
def test_a_cluster_that_cannot_be_used_is_told_once_and_looked_at_again(
    environ: dict[str, str] | None, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dashboard = Dashboard()
    with served(dashboard.app) as url:

        async def body() -> None:
            one = deployer("http://127.0.0.1:9", ORDER) if environ is None else deployer(url, ORDER, environ)
            for now in range(3):
                await one.look(float(now))

        asyncio.run(body())
    out = capsys.readouterr().out
    assert out.count(says) == 1
    assert not dashboard.submitted


def test_a_job_may_fail_for_years() -> None:
    one = Deployer(RayApi("http://127.0.0.1:9", {}), "bar", ORDER, {})
    one._failures = 2000

    async def body() -> None:
        with served(Dashboard(ends="FAILED").app) as url:
            one._api = RayApi(url, ENVIRON)
            await one.look(0.0)
            assert one._not_before == 60.0

    asyncio.run(body())


def test_a_job_that_runs_long_enough_has_its_failures_forgiven_and_its_lines_said_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    dashboard = Dashboard()
    with served(dashboard.app) as url:

        async def body() -> None:
            one = deployer(url)
            for now in (0.0, 1.0, 2.0, 100.0):
                await one.look(now)
            assert one.settled
            assert one._failures == 0

        asyncio.run(body())
    assert capsys.readouterr().out.count("the reason") == 1


@pytest.mark.parametrize("body", ["<html>", "[1, 2]", '{"data": 3}', "null"])
def test_what_is_no_dashboard_is_told_and_breaks_nothing(body: str) -> None:
    app = FastAPI()

    @app.get("/{path:path}")
    def strange(path: str) -> Response:
        return Response(body, media_type="application/json")

    with served(app) as url:
        api = RayApi(url, ENVIRON)
        for call in (api.jobs, api.node_addresses):
            with pytest.raises(ConfigError, match="is no dashboard of Ray"):
                asyncio.run(call())


def test_a_host_that_cannot_be_found_disturbs_no_other() -> None:
    async def first() -> frozenset[str]:
        source = engine_source("127.0.0.1:50051,no-such-host.invalid:50051,a..b:5")
        return await asyncio.wait_for(anext(source()), 10)

    assert asyncio.run(first()) == {"127.0.0.1:50051"}


@pytest.mark.parametrize(
    "text", ["", "host", "host:0", "host:99999", "kubernetes:x", "ray:head:8265", "ray:http://h#0"]
)
def test_a_source_that_names_no_engines_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="which names no engines"):
        engine_source(text, {})


class FakeEngines(RayEngines):
    """Actors as a table: name -> (command, node, ready), or the error that asking gives."""

    def __init__(self, table: dict[str, Any], replicas: int, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__("ns", replicas, [command], loopback=True)
        self.ended: list[str] = []
        self.table = table
        monkeypatch.setattr(engines_module, "engine_names", lambda namespace: sorted(table))
        monkeypatch.setattr(engines_module, "about", lambda namespace, name: self._about(name))
        monkeypatch.setattr(engines_module, "end_engine", lambda namespace, name: self._end(name))

    def _about(self, name: str) -> Any:
        if isinstance(self.table[name], Exception):
            raise self.table[name]
        return self.table[name]

    def _end(self, name: str) -> None:
        self.ended.append(name)
        del self.table[name]

    def _make(self, name: str) -> None:
        self.table[name] = (self.command, "node", False)


def test_engines_are_replaced_one_at_a_time_and_only_while_the_others_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    table: dict[str, Any] = {f"engine-{number}": (("old",), "node", True) for number in range(3)}
    engines = FakeEngines(table, 3, "new", monkeypatch)
    for number in range(3):
        engines.tend()
        assert engines.ended == [f"engine-{done}" for done in range(number + 1)]
        for _ in range(3):  # the new one loads
            assert engines.tend() == [f"engine-{number} loads"]
        assert len(engines.ended) == number + 1
        table[f"engine-{number}"] = (("new",), "node", True)
    assert engines.tend() == []
    assert len(engines.ended) == 3


def test_engines_that_are_missing_are_made_and_those_too_many_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    table: dict[str, Any] = {f"engine-{number}": (("new",), "node", True) for number in (1, 2)}
    engines = FakeEngines(table, 2, "new", monkeypatch)
    engines.tend()
    assert sorted(table) == ["engine-0", "engine-1"]


def test_what_keeps_an_engine_from_serving_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    table: dict[str, Any] = {"engine-0": GetTimeoutError(), "engine-1": RayError("first\nno such command")}
    told = FakeEngines(table, 2, "new", monkeypatch).tend()
    assert told == ["engine-0 waits for a node that offers barista_engine", "engine-1 cannot run: no such command"]


def test_what_a_pool_keeps_of_the_order_that_made_it_is_told() -> None:
    made = PoolConfig(
        pool="bar", workers=2, threads=1, redundancy=2, worker_memory=None, tls_dir=None,
        model=cast("Any", None), expert_bytes={},
    )  # fmt: skip
    assert unheeded(made, dataclasses.replace(made, workers=3, engines=2)) == ""
    text = unheeded(made, dataclasses.replace(made, redundancy=3))
    assert "redundancy 2 (ordered: 3)" in text
    assert "--remove" in text


def test_nodes_are_those_that_live() -> None:
    with served(Dashboard().app) as url:
        assert asyncio.run(RayApi(url, ENVIRON).node_addresses()) == ["10.0.0.1", "10.0.0.2"]


def test_a_token_may_be_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("ray-token\n")
    with served(Dashboard().app) as url:
        assert asyncio.run(RayApi(url, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}).jobs()) == []
        (tmp_path / ".ray").mkdir()
        (tmp_path / "token").rename(tmp_path / ".ray" / "auth_token")
        assert asyncio.run(RayApi(url, {"HOME": str(tmp_path)}).jobs()) == []
    with pytest.raises(ConfigError, match=r"token.*RAY_AUTH_TOKEN_PATH"):
        RayApi(url, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")})


@pytest.mark.parametrize("url", ["head:8265", "head", "http://", "http://head:port", "ftp://head:8265", ""])
def test_what_is_no_url_of_a_dashboard_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(repr(url))} is no URL"):
        RayApi(url, {})


def test_removing_stops_the_job_and_runs_another_that_takes_down_what_is_left() -> None:
    dashboard = Dashboard(ends="SUCCEEDED")
    dashboard.jobs["barista-bar-12345678-1"] = {"submission_id": "barista-bar-12345678-1", "status": "RUNNING"}
    dashboard.jobs["barista-other-12345678-1"] = {"submission_id": "barista-other-12345678-1", "status": "RUNNING"}
    with served(dashboard.app) as url:
        asyncio.run(deployer(url).remove())
    assert dashboard.jobs["barista-bar-12345678-1"]["status"] == "STOPPED"
    assert dashboard.jobs["barista-other-12345678-1"]["status"] == "RUNNING"
    (body,) = dashboard.submitted
    assert body["entrypoint"] == "python -m experts.cluster.remove bar"


def test_the_order_names_engines_and_port() -> None:
    config = ServeConfig(pool="bar", workers=2)
    assert order_of(config, 3, 50051) == (
        "barista keep house-blend --workers 2 --pool bar --engine-replicas 3 --engine-port 50051"
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["deploy", "--pool", "bar", "--workers", "2"], "--ray"),
        (["deploy", "--ray", "http://x", "--workers", "2"], "pool None"),
        (["engine", "--workers", "2"], "barista engine starts no pool of workers"),
        (["engine", "--host", "0.0.0.0"], "without encryption"),
        (["serve", "--engines", "nonsense"], "engines is 'nonsense'"),
        (["serve", "--engines", "a:1", "--workers", "2"], "workers is 2, but the engines run elsewhere"),
        (["serve", "--tls-dir", "x"], "tls_dir is x, but there is no pool of workers"),
        (["drain"], "name a WORKER"),
        (["drain", "worker-1", "--node"], "name a WORKER"),
    ],
)
def test_bad_input_is_named(words: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from router.cli import app

    monkeypatch.setenv(TOKEN_VARIABLE, "x")
    result = CliRunner().invoke(app, words)
    assert result.exit_code != 0
    assert says in " ".join((result.output + str(result.exception)).replace("│", " ").split())


@pytest.mark.parametrize("words", [["engine"], ["serve", "--engines", "127.0.0.1:1"]])
def test_without_the_deployments_token_nothing_starts(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from router.cli import app

    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, ConfigError)
    assert TOKEN_VARIABLE in str(result.exception)


def test_a_pool_on_gpus_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"device is 'cuda', but pool is house: pools compute on CPUs alone"):
        dataclasses.replace(ServeConfig(pool="house", workers=2), device="cuda")
