from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from barista.metrics import load_imbalance
from router.messages import ExpertCacheStats, LinkStats, PoolStats
from tests.unit.fake_engine import FakeEngine, client, fake_app

pytestmark = pytest.mark.anyio
TEXT = "/v1/completions"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def scrape(engine: FakeEngine, *bodies: dict[str, object]) -> dict[tuple[str, ...], float]:
    """(name, label values in the order of the labels' names...) -> value after some requests."""
    async with client(fake_app(engine)) as http:
        for body in bodies:
            await http.post(TEXT, json=body)
        response = await http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(response.text)
    return {
        (s.name.removeprefix("barista:"), *(s.labels[label] for label in sorted(s.labels))): s.value
        for f in families
        for s in f.samples
    }


async def test_requests_are_counted_and_timed():
    values = await scrape(FakeEngine(), {"prompt": "abc", "max_tokens": 5, "n": 2}, {"prompt": "a"}, {"prompt": 1})
    assert values["prompt_tokens_total",] == 4
    assert values["generation_tokens_total",] == 2 * 5 + 13
    assert values["request_success_total", "length"] == 2
    assert values["request_success_total", "stop"] == 1
    assert values["time_to_first_token_seconds_count",] == 3
    assert values["inter_token_latency_seconds_count",] == 2 * 4 + 12
    assert values["e2e_request_latency_seconds_count",] == 3


async def test_failures_are_counted_by_code():
    values = await scrape(FakeEngine(fail=1, fail_code="engine_dead"), {"prompt": "a"}, {"prompt": ""})
    assert values["request_failure_total", "engine_dead"] == 1
    assert values["request_failure_total", "invalid_request"] == 1


async def test_the_engines_numbers_are_shown():
    values = await scrape(FakeEngine())
    assert values["num_requests_running",] == 1
    assert values["kv_cache_usage_perc",] == 0.25
    assert values["prefix_cache_queries_total",] == 10
    assert values["prefix_cache_hits_total",] == 4
    assert values["step_seconds_sum",] == 0.5
    assert values["iteration_tokens_total_sum",] == 20
    assert values["iteration_tokens_total_count",] == 5
    assert values["expert_tokens_total", "0", "1"] == 30
    assert values["expert_load_imbalance", "1"] == 3.0
    for name in ("placement_epoch", "experts_uncovered", "resends_total", "hedges_total", "num_preemptions_total"):
        assert values[name,] == 0


async def test_the_experts_in_memory_are_shown_where_they_are_limited():
    values = await scrape(FakeEngine(expert_cache=ExpertCacheStats(queries=10, hits=7, resident_bytes=4096)))
    assert values["expert_cache_queries_total",] == 10
    assert values["expert_cache_hits_total",] == 7
    assert values["expert_cache_bytes",] == 4096
    assert not any(name.startswith("expert_cache") for name, *_ in await scrape(FakeEngine()))


async def test_the_pools_numbers_are_shown():
    links = (
        LinkStats("worker-0", "shm", "ready", 10, 60, 4000, 8000, 0.5, 0.25),
        LinkStats("worker-1", "grpc", "suspect", 10, 20, 400, 800, 0.75, 0.5),
    )
    pool = PoolStats(
        epoch=7, experts_uncovered=2, resends=3, hedges=4, stale_epochs=5, nonfinite_rows=6, on_demand_loads=8,
        layers=12, dispatch_seconds=0.125, combine_seconds=1.5, links=links,
    )  # fmt: skip
    values = await scrape(FakeEngine(pool=pool))
    expected = {
        ("placement_epoch",): 7, ("experts_uncovered",): 2, ("resends_total",): 3, ("hedges_total",): 4,
        ("stale_epochs_total",): 5, ("nonfinite_expert_rows_total",): 6, ("on_demand_loads_total",): 8,
        ("dispatch_seconds_count",): 12, ("dispatch_seconds_sum",): 0.125, ("combine_seconds_sum",): 1.5,
        ("worker_load_imbalance",): 1.5, ("worker_rows_total", "worker-0"): 60,
        ("worker_dispatches_total", "worker-1"): 10, ("worker_bytes_total", "received", "worker-0"): 8000,
        ("worker_bytes_total", "sent", "worker-1"): 400, ("worker_exchange_seconds_sum", "worker-1"): 0.75,
        ("worker_compute_seconds_sum", "worker-0"): 0.25, ("worker_compute_seconds_count", "worker-0"): 10,
        ("worker_up", "shm", "worker-0"): 1, ("worker_up", "grpc", "worker-1"): 0,
    }  # fmt: skip
    assert {name: values.get(name) for name in expected} == expected


@pytest.mark.parametrize(("tokens", "expected"), [((5, 5), 1.0), ((0, 0), 1.0), ((8, 0, 0, 0), 4.0)])
def test_load_imbalance_is_the_busiest_over_the_average(tokens: tuple[int, ...], expected: float):
    assert load_imbalance(tokens) == expected
