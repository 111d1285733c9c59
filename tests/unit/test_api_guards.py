"""Keys, the bounded queue, readiness and draining."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from barista.errors import InvalidRequest, Overloaded
from router.api.admission import Admission
from router.api.settings import ApiSettings
from tests.unit.fake_engine import FakeEngine, client, fake_app

pytestmark = pytest.mark.anyio
TEXT = "/v1/completions"
KEYS = tuple(hashlib.sha256(key).digest() for key in (b"one", b"two"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/nowhere", TEXT, "/tokenize"])
async def test_without_a_valid_key_every_path_is_closed(path: str):
    async with client(fake_app(api_keys=KEYS)) as http:
        for headers in ({}, bearer("three"), bearer(""), {"authorization": "Basic one"}, {"authorization": "one"}):
            response = await http.get(path, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


async def test_health_and_readiness_need_no_key():
    async with client(fake_app(api_keys=KEYS)) as http:
        assert [(await http.get(path)).status_code for path in ("/health", "/live", "/ready")] == [200] * 3


async def test_every_key_opens_and_has_its_own_cache_salt():
    engine = FakeEngine()
    async with client(fake_app(engine, api_keys=KEYS)) as http:
        for key in ("one", "two", "one"):
            assert (await http.post(TEXT, json={"prompt": "a"}, headers=bearer(key))).status_code == 200
    one, two, again = (submit.salt for submit in engine.submitted)
    assert one == again != two
    assert one == hashlib.sha256(KEYS[0]).digest()[:16]


async def test_without_keys_the_salt_is_empty():
    engine = FakeEngine()
    async with client(fake_app(engine)) as http:
        await http.post(TEXT, json={"prompt": "a"})
    assert engine.submitted[0].salt == b""


async def held(engine: FakeEngine, http: Any, body: dict[str, Any], headers: dict[str, str]) -> asyncio.Task[Any]:
    """A request that waits for its first token until the engine's gate opens."""
    before = len(engine.submitted)
    task = asyncio.create_task(http.post(TEXT, json=body, headers=headers))
    while len(engine.submitted) == before:
        await asyncio.sleep(0.001)
    return task


@pytest.mark.parametrize(
    ("bounds", "body", "code", "status"),
    [
        ({"max_waiting_requests": 2}, {"prompt": "a", "n": 2}, "overloaded", 503),
        ({"max_waiting_tokens": 5}, {"prompt": "abc"}, "overloaded", 503),
        ({"max_open_per_key": 1}, {"prompt": "a"}, "rate_limit", 429),
    ],
)
async def test_a_full_server_says_when_to_come_back(
    bounds: dict[str, int], body: dict[str, Any], code: str, status: int
):
    engine = FakeEngine(gate=asyncio.Event())
    assert engine.gate is not None
    async with client(fake_app(engine, api_keys=KEYS, **bounds)) as http:
        first = await held(engine, http, {"prompt": "abc"}, bearer("one"))
        refused = await http.post(TEXT, json=body, headers=bearer("one"))
        engine.gate.set()
        assert (await first).status_code == 200
        after = await http.post(TEXT, json=body, headers=bearer("one"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
    assert int(refused.headers["retry-after"]) > 0
    assert after.status_code == 200


async def test_one_key_does_not_use_up_anothers_share():
    engine = FakeEngine(gate=asyncio.Event())
    assert engine.gate is not None
    async with client(fake_app(engine, api_keys=KEYS, max_open_per_key=1)) as http:
        first = await held(engine, http, {"prompt": "a"}, bearer("one"))
        second = await held(engine, http, {"prompt": "a"}, bearer("two"))
        engine.gate.set()
        assert [(await task).status_code for task in (first, second)] == [200, 200]


async def test_a_sequence_with_a_token_waits_no_longer():
    engine = FakeEngine(gate=asyncio.Event(), gate_at=1)
    assert engine.gate is not None
    async with client(fake_app(engine, max_waiting_requests=1, max_waiting_tokens=1)) as http:
        first = await held(engine, http, {"prompt": "abc"}, {})
        for _ in range(50):  # the first token needs a few turns of the event loop to arrive
            second = await http.post(TEXT, json={"prompt": "a", "max_tokens": 1})
            if second.status_code == 200:
                break
        assert second.status_code == 200
        assert not first.done()
        engine.gate.set()
        assert (await first).status_code == 200


async def test_one_sequence_over_the_bounds_runs_when_nobody_waits():
    for bound in (0, 1):
        async with client(fake_app(max_waiting_requests=bound, max_waiting_tokens=bound)) as http:
            assert (await http.post(TEXT, json={"prompt": "abc"})).status_code == 200


@pytest.mark.parametrize(
    ("bounds", "body", "fits"),
    [
        ({"max_waiting_requests": 6}, {"prompt": ["a", "b", "c", "d"], "n": 2}, {"prompt": ["a", "b", "c"], "n": 2}),
        ({"max_waiting_tokens": 6}, {"prompt": "abcd", "n": 2}, {"prompt": ["abcd", "ef"]}),
        ({"max_open_per_key": 3}, {"prompt": "a", "n": 4}, {"prompt": "a", "n": 3}),
    ],
)
async def test_one_request_cannot_be_more_sequences_than_the_queue_holds(
    bounds: dict[str, int], body: dict[str, Any], fits: dict[str, Any]
):
    engine = FakeEngine()
    async with client(fake_app(engine, api_keys=KEYS, **bounds)) as http:
        refused = await http.post(TEXT, json=body, headers=bearer("one"))
        assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
        assert engine.submitted == []
        assert (await http.post(TEXT, json=fits, headers=bearer("one"))).status_code == 200


async def test_a_keys_share_is_counted_in_sequences():
    engine = FakeEngine(gate=asyncio.Event())
    assert engine.gate is not None
    async with client(fake_app(engine, api_keys=KEYS, max_open_per_key=4)) as http:
        first = await held(engine, http, {"prompt": "a", "n": 3}, bearer("one"))
        refused = await asyncio.wait_for(http.post(TEXT, json={"prompt": "a", "n": 2}, headers=bearer("one")), 2)
        last = asyncio.create_task(http.post(TEXT, json={"prompt": "a"}, headers=bearer("one")))
        await asyncio.sleep(0.01)
        engine.gate.set()
        assert [(await task).status_code for task in (first, last)] == [200, 200]
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:80", "[::1]:8000", "[::1]"])
async def test_without_keys_names_of_this_machine_are_answered(host: str):
    async with client(fake_app()) as http:
        assert (await http.get("/v1/models", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:1", "", "10.0.0.1",
             "127.0.0.1:80:80", "[::1", "evil@127.0.0.1"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics", "/nowhere", TEXT])
async def test_without_keys_a_page_that_rebinds_its_name_is_refused(host: str, path: str):
    async with client(fake_app()) as http:
        response = await http.post(path, json={"prompt": "a"}, headers={"host": host})
    assert (response.status_code, response.json()["error"]["code"]) == (421, "wrong_host")


async def test_with_keys_a_server_has_any_name():
    async with client(fake_app(api_keys=KEYS)) as http:
        response = await http.get("/v1/models", headers=bearer("one") | {"host": "barista.example"})
    assert response.status_code == 200


async def test_draining_finishes_what_is_open_and_refuses_the_rest():
    engine = FakeEngine(gate=asyncio.Event())
    assert engine.gate is not None
    app = fake_app(engine)
    async with client(app) as http:
        first = await held(engine, http, {"prompt": "a"}, {})
        app.state.drain()
        refused = await asyncio.wait_for(http.post(TEXT, json={"prompt": "a"}), 2)
        ready = await http.get("/ready")
        idle = asyncio.create_task(app.state.wait_idle())
        await asyncio.sleep(0)
        assert not idle.done()
        engine.gate.set()
        assert (await first).status_code == 200
        await asyncio.wait_for(idle, 1)
        assert (await http.get("/health")).status_code == 200
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert "retry-after" in refused.headers
    assert ready.status_code == 503


async def test_live_says_whether_the_engine_makes_progress():
    engine = FakeEngine(hung=True)
    async with client(fake_app(engine)) as http:
        assert (await http.get("/live")).status_code == 200
        engine.progress = False
        stuck = await http.get("/live")
    assert (stuck.status_code, stuck.json()["error"]["code"]) == (503, "no_progress")


async def test_until_the_engine_is_ready_only_health_and_models_answer():
    engine = FakeEngine(ready=False)
    async with client(fake_app(engine)) as http:
        statuses = {
            path: (await http.get(path)).status_code for path in ("/health", "/ready", "/v1/models", "/metrics")
        }
        refused = await http.post(TEXT, json={"prompt": "a"})
        engine.ready = True
        served = await http.post(TEXT, json={"prompt": "a"})
    assert statuses == {"/health": 200, "/ready": 503, "/v1/models": 200, "/metrics": 200}
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
    assert served.status_code == 200


async def test_the_served_model_is_listed():
    async with client(fake_app(model_id="org/blend")) as http:
        listed = (await http.get("/v1/models")).json()["data"]
        one = await http.get("/v1/models/org/blend")
        other = await http.get("/v1/models/blend")
    assert listed == [one.json()]
    assert (listed[0]["id"], listed[0]["max_model_len"]) == ("org/blend", 256)
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9), st.integers(0, 4)), max_size=12))
def test_admission_counts_return_to_zero(requests: list[tuple[int, int, int]]):
    """Whatever was admitted or refused, at whichever stage it ended."""

    async def run() -> None:
        admission = Admission(ApiSettings(max_waiting_requests=6, max_waiting_tokens=20, max_open_per_key=6))
        open_tickets = []
        for num_sequences, num_tokens, num_started in requests:
            try:
                ticket = admission.enter(b"key", num_sequences)
            except Overloaded:
                continue
            open_tickets.append(ticket)
            try:
                ticket.queue([num_tokens] * num_sequences)
            except (Overloaded, InvalidRequest):
                ticket.__exit__(None, None, None)
                open_tickets.pop()
                continue
            for sequence in range(num_started):
                ticket.started(sequence)
                ticket.started(sequence)
        idle = asyncio.create_task(admission.wait_idle())
        await asyncio.sleep(0)
        assert idle.done() == (not open_tickets)
        for ticket in open_tickets:
            ticket.__exit__(None, None, None)
        await asyncio.wait_for(idle, 1)
        assert (admission.waiting_requests, admission.waiting_tokens) == (0, 0)
        admission.enter(b"key", 6)  # the key's whole share

    asyncio.run(run())
