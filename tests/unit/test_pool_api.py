"""GET /pool, the commands to it, and readiness while experts are on workers. A fake controller, a fake engine."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from barista.v1 import controller_pb2 as pb
from router.api.pool_report import pool_report
from router.messages import LinkStats, PoolStats, Stats
from router.pool_client import PoolClient
from tests.unit.fake_controller import FakeController, fake_controller, two_workers
from tests.unit.fake_engine import FakeEngine, client, fake_app

pytestmark = pytest.mark.anyio
USER, ADMIN = (hashlib.sha256(key).digest() for key in (b"user", b"admin"))
COMMANDS = (("/pool/drain", {"worker": "worker-1"}), ("/pool/scale", {"workers": 3}), ("/pool/rebalance", {}))
LINKS = (
    LinkStats("worker-0", "shm", "ready", 10, 60, 4000, 8000, 0.5, 0.25),
    LinkStats("worker-1", "grpc", "suspect", 10, 20, 400, 800, 0.75, 0.5),
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def controller() -> Iterator[FakeController]:
    with fake_controller() as controller:
        yield controller


@pytest.fixture
async def pool(controller: FakeController) -> AsyncIterator[PoolClient]:
    pool = controller.client()
    yield pool
    await pool.close()


def pooled(**stats: Any) -> FakeEngine:
    return FakeEngine(pool=PoolStats(**stats))


async def get(path: str, engine: FakeEngine, pool: PoolClient | None) -> httpx.Response:
    async with client(fake_app(engine, pool=pool)) as http:
        return await http.get(path)


async def post(path: str, body: Any, pool: PoolClient | None, key: str = "", **settings: Any) -> httpx.Response:
    async with client(fake_app(pooled(), pool=pool, **settings)) as http:
        return await http.post(path, json=body, headers={"authorization": f"Bearer {key}"} if key else {})


async def test_without_workers_the_pool_is_empty_and_covered() -> None:
    assert (await get("/pool", FakeEngine(), None)).json() == {"epoch": 0, "coverage": 1.0, "workers": []}


@pytest.mark.parametrize(("path", "body"), COMMANDS)
async def test_without_workers_commands_are_refused_with_a_remedy(path: str, body: Any) -> None:
    response = await post(path, body, None)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "no_workers")
    assert "has no pool" in response.json()["error"]["message"]


async def test_the_pool_is_what_controller_and_engine_know(pool: PoolClient) -> None:
    report = (await get("/pool", pooled(epoch=3, resends=4, hedges=1, links=LINKS), pool)).json()
    first, second = report.pop("workers")
    assert report == {
        "epoch": 3, "coverage": 1.0, "experts_uncovered": 0, "imbalance": 1.5, "moves": 5, "resends": 4, "hedges": 1,
        "engines": 1, "problem": "", "pool": "",
        "layers": [{"layer": 1, "tokens": [30, 10, 0, 0], "replicas": [["worker-0"], ["worker-0", "worker-1"]]}],
    }  # fmt: skip
    assert first == {
        "name": "worker-0", "pid": 100, "address": "127.0.0.1:7000", "state": "ready", "numerics_id": "fake-f32",
        "bytes": 2000, "capacity_bytes": 4000, "node": "here", "restarts": 0, "transport": "shm", "dispatches": 10,
        "rows": 60, "latency_ms": 50.0, "detail": "",
    }  # fmt: skip
    assert (second["name"], second["state"], second["transport"]) == ("worker-1", "suspect", "grpc")


def test_workers_are_sorted_by_number_and_those_that_have_left_are_not_shown() -> None:
    names = ["worker-10", "worker-2", "worker-0"]
    state = pb.PoolState(workers=[pb.Worker(name=name) for name in names])
    links = (LinkStats("worker-1", "none", "down"),)
    report = pool_report(state, Stats(pool=PoolStats(links=links)))
    assert [worker["name"] for worker in report["workers"]] == ["worker-0", "worker-2", "worker-10"]


def test_the_controllers_word_on_a_lost_worker_stands() -> None:
    state = two_workers()
    state.workers[0].state, state.workers[0].detail = pb.WORKER_STATE_LOST, "gone"
    (worker, _) = pool_report(state, Stats(pool=PoolStats(links=LINKS)))["workers"]
    assert (worker["state"], worker["detail"]) == ("lost", "gone")


@given(st.integers(0, 2), st.integers(0, 2))
def test_coverage_is_complete_only_where_both_sides_say_so(of_controller: int, of_engine: int) -> None:
    state = two_workers()
    state.coverage, state.experts_uncovered = 1 - of_controller / 2, of_controller
    report = pool_report(state, Stats(pool=PoolStats(experts_uncovered=of_engine)))
    assert report["experts_uncovered"] == max(of_controller, of_engine)
    assert report["coverage"] == 1 - max(of_controller, of_engine) / 2


async def test_while_the_controller_is_away_the_engines_view_is_shown() -> None:
    with fake_controller() as controller:
        pool = controller.client()
    report = (await get("/pool", pooled(epoch=3, links=LINKS), pool)).json()
    assert [worker["name"] for worker in report["workers"]] == ["worker-0", "worker-1"]
    assert (report["epoch"], report["coverage"]) == (3, 1.0)
    assert "controller does not answer" in report["problem"]
    await pool.close()


async def test_while_the_engine_is_in_a_long_step_the_controllers_view_is_shown(pool: PoolClient) -> None:
    report = (await get("/pool", FakeEngine(hung=True), pool)).json()
    assert len(report["workers"]) == 2
    assert "engine does not answer" in report["problem"]


async def test_before_there_is_a_controller_the_pool_is_not_ready() -> None:
    response = await get("/pool", FakeEngine(ready=False), PoolClient(lambda: None))
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")


async def test_a_wrong_token_is_the_servers_fault_and_not_retried(controller: FakeController) -> None:
    pool = controller.client(token="another")
    response = await post("/pool/drain", {"worker": "worker-1"}, pool)
    assert (response.status_code, response.headers["x-should-retry"]) == (500, "false")
    assert "another" not in response.text
    await pool.close()


async def test_commands_reach_the_controller(controller: FakeController, pool: PoolClient) -> None:
    drained = await post("/pool/drain", {"worker": "worker-1"}, pool)
    scaled = await post("/pool/scale", {"workers": 3}, pool)
    rebalanced = await post("/pool/rebalance", {"dry_run": True}, pool)
    assert [response.status_code for response in (drained, scaled, rebalanced)] == [200, 200, 200]
    assert controller.calls == [
        pb.DrainWorkerRequest(worker="worker-1"),
        pb.ScaleRequest(workers=3),
        pb.RebalanceRequest(dry_run=True),
    ]
    assert drained.json()["epoch"] == scaled.json()["epoch"] == 3
    assert rebalanced.json() == {
        "moves": [{"layer": 1, "expert": 0, "from": None, "to": "worker-1"}],
        "imbalance_before": 1.5,
        "imbalance_after": 1.25,
        "dry_run": True,
    }


@pytest.mark.parametrize(
    ("code", "status", "name"),
    [
        (grpc.StatusCode.NOT_FOUND, 404, "worker_not_found"),
        (grpc.StatusCode.INVALID_ARGUMENT, 400, "invalid_argument"),
        (grpc.StatusCode.FAILED_PRECONDITION, 422, "refused_by_the_pool"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 422, "refused_by_the_pool"),
    ],
)
async def test_a_refusal_keeps_the_controllers_words_and_invites_no_retry(
    controller: FakeController, pool: PoolClient, code: grpc.StatusCode, status: int, name: str
) -> None:
    controller.refusal = code, "Expert 3 of layer 1 lives nowhere else. Start another worker first."
    response = await post("/pool/drain", {"worker": "worker-1"}, pool)
    assert (response.status_code, response.json()["error"]["code"]) == (status, name)
    assert response.json()["error"]["message"] == controller.refusal[1]


async def test_a_controller_that_is_away_may_be_asked_again() -> None:
    with fake_controller() as controller:
        pool = controller.client()
    response = await post("/pool/scale", {"workers": 3}, pool)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "controller_unavailable")
    assert response.headers["retry-after"] == "1"
    await pool.close()


@pytest.mark.parametrize(
    ("path", "body"),
    [("/pool/drain", {}), ("/pool/drain", {"worker": ""}), ("/pool/scale", {"workers": 0}),
     ("/pool/scale", {"workers": "3"}), ("/pool/rebalance", {"dry_run": 1}), ("/pool/rebalance", {"dry": True})],
)  # fmt: skip
async def test_a_command_that_says_nothing_sensible_reaches_nobody(
    controller: FakeController, pool: PoolClient, path: str, body: Any
) -> None:
    assert (await post(path, body, pool)).status_code == 400
    assert controller.calls == []


@pytest.mark.parametrize(
    ("settings", "key", "status", "code"),
    [
        ({}, "", 200, None),
        ({"api_keys": (USER,)}, "", 401, "invalid_api_key"),
        ({"api_keys": (USER,)}, "user", 403, "no_admin_keys"),
        ({"api_keys": (USER,), "admin_keys": (ADMIN,)}, "user", 403, "admin_key_required"),
        ({"api_keys": (USER,), "admin_keys": (ADMIN,)}, "admin", 200, None),
        ({"admin_keys": (ADMIN,)}, "", 403, "admin_key_required"),
        ({"admin_keys": (ADMIN,)}, "admin", 200, None),
    ],
)
async def test_who_may_change_the_pool(
    controller: FakeController, pool: PoolClient, settings: Any, key: str, status: int, code: str | None
) -> None:
    for path, body in COMMANDS:
        response = await post(path, body, pool, key, **settings)
        assert response.status_code == status
        assert code is None or response.json()["error"]["code"] == code
    assert len(controller.calls) == (len(COMMANDS) if status == 200 else 0)


@pytest.mark.parametrize("key", ["user", "admin"])
async def test_any_valid_key_may_look_at_the_pool(pool: PoolClient, key: str) -> None:
    async with client(fake_app(pooled(), pool=pool, api_keys=(USER,), admin_keys=(ADMIN,))) as http:
        assert (await http.get("/pool")).status_code == 401
        assert (await http.get("/pool", headers={"authorization": f"Bearer {key}"})).status_code == 200


async def test_ready_means_that_every_expert_is_covered() -> None:
    assert (await get("/ready", pooled(), None)).status_code == 200
    response = await get("/ready", pooled(experts_uncovered=2), None)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "experts_uncovered")
    assert "2 of the experts" in response.json()["error"]["message"]


async def test_a_hung_engine_is_alive_but_not_ready() -> None:
    engine = FakeEngine(hung=True)
    assert (await get("/health", engine, None)).status_code == 200
    assert (await get("/ready", engine, None)).status_code == 503


async def test_requests_are_served_while_experts_are_uncovered() -> None:
    async with client(fake_app(pooled(experts_uncovered=2))) as http:
        assert (await http.post("/v1/completions", json={"prompt": "a"})).status_code == 200


async def test_the_pools_moves_are_a_metric(pool: PoolClient) -> None:
    assert "barista:placement_moves_total 5.0" in (await get("/metrics", pooled(), pool)).text
    assert "placement_moves" not in (await get("/metrics", FakeEngine(), None)).text
