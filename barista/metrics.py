"""Prometheus metrics: vLLM's names under the prefix `barista:`, and what an MoE server needs beside them.

Latencies and tokens are counted where they happen. The engine's own numbers are fetched once per scrape.
prometheus-client appends `_total` to the names of counters.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from barista.gpu_metrics import GpuStats, gpu_metrics

PREFIX = "barista:"
CONTENT_TYPE = CONTENT_TYPE_LATEST

FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 40, 160)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 20, 80)
REQUEST_BUCKETS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)


class LinkStats(Protocol):
    """The wire to one worker (router.messages.LinkStats). Seconds and bytes; rows are (token, expert) pairs."""

    @property
    def worker(self) -> str: ...
    @property
    def transport(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def dispatches(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def bytes_sent(self) -> int: ...
    @property
    def bytes_received(self) -> int: ...
    @property
    def exchange_seconds(self) -> float: ...
    @property
    def compute_seconds(self) -> float: ...


class PoolStats(Protocol):
    """The expert pool as the engine sees it (router.messages.PoolStats). Counters count from the engine's start."""

    @property
    def epoch(self) -> int: ...
    @property
    def experts_uncovered(self) -> int: ...
    @property
    def resends(self) -> int: ...
    @property
    def hedges(self) -> int: ...
    @property
    def stale_epochs(self) -> int: ...
    @property
    def nonfinite_rows(self) -> int: ...
    @property
    def on_demand_loads(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def dispatch_seconds(self) -> float: ...
    @property
    def combine_seconds(self) -> float: ...
    @property
    def links(self) -> Sequence[LinkStats]: ...


class ExpertCacheStats(Protocol):
    """The experts in memory where only some of them are (router.messages.ExpertCacheStats)."""

    @property
    def queries(self) -> int: ...
    @property
    def hits(self) -> int: ...
    @property
    def resident_bytes(self) -> int: ...


class EngineStats(Protocol):
    """What the engine tells of itself (router.messages.Stats). Counters count from its start."""

    @property
    def num_requests_running(self) -> int: ...
    @property
    def num_requests_waiting(self) -> int: ...
    @property
    def kv_blocks_total(self) -> int: ...
    @property
    def kv_blocks_used(self) -> int: ...
    @property
    def prefix_cache_queries(self) -> int: ...
    @property
    def prefix_cache_hits(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def step_seconds(self) -> float: ...
    @property
    def iteration_tokens(self) -> int: ...
    @property
    def group_workers(self) -> int: ...
    @property
    def group_workers_lost(self) -> int: ...
    @property
    def recomputed_steps(self) -> int: ...
    @property
    def expert_tokens(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def pool(self) -> PoolStats | None: ...
    @property
    def expert_cache(self) -> ExpertCacheStats | None: ...


class RequestTimer:
    """Times one sequence. arrival: time.perf_counter() when its request came in."""

    def __init__(self, metrics: Metrics, arrival: float) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._last: float | None = None

    def token(self) -> None:
        """A token came out."""
        now = time.perf_counter()
        if self._last is None:
            self._metrics.time_to_first_token.observe(now - self._arrival)
        else:
            self._metrics.inter_token_latency.observe(now - self._last)
        self._metrics.generation_tokens.inc()
        self._last = now

    def finished(self, reason: str) -> None:
        """The sequence is complete."""
        self._metrics.e2e_request_latency.observe(time.perf_counter() - self._arrival)
        self._metrics.request_success.labels(reason).inc()


class Metrics:
    """One application's metrics in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._engine = EngineCollector()
        self.registry.register(self._engine)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens drawn.")
        self.request_success = self._counter("request_success", "Complete sequences.", "finished_reason")
        self.request_failure = self._counter("request_failure", "Requests without a complete answer.", "code")
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST_TOKEN_BUCKETS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a sequence.", TOKEN_BUCKETS
        )
        self.e2e_request_latency = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to the end of a sequence.", REQUEST_BUCKETS
        )

    def timer(self, arrival: float) -> RequestTimer:
        """A timer for one sequence of a request that arrived at `arrival` (time.perf_counter())."""
        return RequestTimer(self, arrival)

    def request_failed(self, status: int, code: str | None) -> None:
        """A request ended without an answer. A client's own mistakes (4xx but 429) count under one code."""
        is_mistake = 400 <= status < 500 and status != 429
        self.request_failure.labels("invalid_request" if is_mistake else code or "internal").inc()

    def client_disconnected(self) -> None:
        """A client left before its answer was complete."""
        self.request_failure.labels("client_disconnected").inc()

    def exposition(self, stats: EngineStats | None, moves: int | None = None, gpus: Sequence[GpuStats] = ()) -> bytes:
        """Everything in Prometheus' text format. stats: None while there is no engine to ask.

        moves: replicas that the pool has moved; None where there is no controller to ask. gpus: under its workers.
        """
        self._engine.stats, self._engine.moves, self._engine.gpus = stats, moves, gpus
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=buckets, registry=self.registry)


class EngineCollector(Collector):
    """The engine's numbers, as of the last `stats` it was given, the pool's `moves` and its workers' `gpus`."""

    def __init__(self) -> None:
        self.stats: EngineStats | None = None
        self.moves: int | None = None
        self.gpus: Sequence[GpuStats] = ()

    def describe(self) -> list[Metric]:
        """Nothing: the names are known only with an engine, and no two collectors share one."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The families of Prometheus' collector protocol."""
        yield _gauge("engine_up", "1 while an engine answers.", self.stats is not None)
        if self.stats is not None:
            yield from _engine_metrics(self.stats)
            yield from _expert_metrics(self.stats.expert_tokens)
            if self.stats.expert_cache is not None:
                yield from _expert_cache_metrics(self.stats.expert_cache)
            if self.stats.group_workers or self.stats.group_workers_lost:
                yield from _group_metrics(self.stats)
            yield from _placement_metrics(self.stats.pool)
            if self.stats.pool is not None:
                yield from _pool_metrics(self.stats.pool, self.moves)
                yield from _worker_metrics(self.stats.pool.links)
        yield from gpu_metrics(self.gpus, PREFIX)


def load_imbalance(tokens: Sequence[int]) -> float:
    """Busiest over average expert of a layer, or worker of a pool: 1 is perfect balance, and the value before any."""
    return max(tokens) * len(tokens) / total if (total := sum(tokens)) else 1.0


def _engine_metrics(stats: EngineStats) -> Iterator[Metric]:
    usage = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
    yield _gauge("num_requests_running", "Sequences in the running batch.", stats.num_requests_running)
    yield _gauge("num_requests_waiting", "Sequences waiting in the engine.", stats.num_requests_waiting)
    yield _gauge("kv_cache_usage_perc", "Used share of the KV blocks, 0..1.", usage)
    yield _counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_cache_queries)
    yield _counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_cache_hits)
    yield _counter("num_preemptions", "Sequences recomputed for want of KV blocks.", stats.num_preemptions)
    yield _summary("iteration_tokens_total", "Tokens per step.", stats.steps, stats.iteration_tokens)
    yield _summary("step_seconds", "Time of a step.", stats.steps, stats.step_seconds)


def _expert_metrics(expert_tokens: Sequence[Sequence[int]]) -> Iterator[Metric]:
    tokens = CounterMetricFamily(PREFIX + "expert_tokens", "Tokens per expert.", labels=("layer", "expert"))
    imbalance = GaugeMetricFamily(
        PREFIX + "expert_load_imbalance", "Busiest over average expert since the start.", labels=("layer",)
    )
    for layer, counts in enumerate(expert_tokens):
        for expert, count in enumerate(counts):
            tokens.add_metric((str(layer), str(expert)), count)
        if counts:
            imbalance.add_metric((str(layer),), load_imbalance(counts))
    yield tokens
    yield imbalance


def _expert_cache_metrics(experts: ExpertCacheStats) -> Iterator[Metric]:
    yield _counter("expert_cache_queries", "Experts that layers asked for, each once a step.", experts.queries)
    yield _counter("expert_cache_hits", "Those that were in memory; the others were read.", experts.hits)
    yield _gauge("expert_cache_bytes", "Experts in memory, in bytes.", experts.resident_bytes)


def _group_metrics(stats: EngineStats) -> Iterator[Metric]:
    yield _gauge("group_workers", "The engine's own workers on GPUs.", stats.group_workers)
    yield _counter("group_workers_lost", "Those that died, hung, or whose GPU failed.", stats.group_workers_lost)
    yield _counter("recomputed_steps", "Steps computed again because a worker was lost.", stats.recomputed_steps)


def _placement_metrics(pool: PoolStats | None) -> Iterator[Metric]:
    """With the experts in the engine's own process there is one placement, always covered, and nothing to resend."""
    epoch, uncovered, resends, hedges = 0, 0, 0, 0
    if pool is not None:
        epoch, uncovered, resends, hedges = pool.epoch, pool.experts_uncovered, pool.resends, pool.hedges
    yield _gauge("placement_epoch", "Number of the placement in use.", epoch)
    yield _gauge("experts_uncovered", "Experts that no reachable worker holds.", uncovered)
    yield _counter("resends", "Dispatches sent again after a failure.", resends)
    yield _counter("hedges", "Dispatches sent again because of a slow worker.", hedges)


def _pool_metrics(pool: PoolStats, moves: int | None) -> Iterator[Metric]:
    yield _counter("stale_epochs", "Answers from a worker that knew a newer placement.", pool.stale_epochs)
    yield _counter("nonfinite_expert_rows", "Expert rows that were not finite.", pool.nonfinite_rows)
    yield _counter("on_demand_loads", "Experts that a survivor loaded while a step waited.", pool.on_demand_loads)
    yield _summary("dispatch_seconds", "Splitting and sending one layer's rows.", pool.layers, pool.dispatch_seconds)
    yield _summary("combine_seconds", "Waiting for and adding one layer's rows.", pool.layers, pool.combine_seconds)
    imbalance = load_imbalance([link.rows for link in pool.links])
    yield _gauge("worker_load_imbalance", "Busiest over average worker since the start, by rows.", imbalance)
    if moves is not None:
        yield _counter("placement_moves", "Replicas that the pool has loaded or released since it began.", moves)


def _worker_metrics(links: Sequence[LinkStats]) -> Iterator[Metric]:
    up = GaugeMetricFamily(PREFIX + "worker_up", "1 while a worker answers in time.", labels=("worker", "transport"))
    rows = _per_worker_counter("worker_rows", "(token, expert) pairs sent.")
    dispatches = _per_worker_counter("worker_dispatches", "Dispatches sent.")
    nbytes = _per_worker_counter("worker_bytes", "Bytes of rows and ids on the wire.", "direction")
    exchange = _per_worker_summary("worker_exchange_seconds", "From a dispatch to its rows.")
    compute = _per_worker_summary("worker_compute_seconds", "Of an exchange, what the worker computed.")
    for link in links:
        up.add_metric((link.worker, link.transport), link.state == "ready")
        rows.add_metric((link.worker,), link.rows)
        dispatches.add_metric((link.worker,), link.dispatches)
        nbytes.add_metric((link.worker, "sent"), link.bytes_sent)
        nbytes.add_metric((link.worker, "received"), link.bytes_received)
        exchange.add_metric((link.worker,), link.dispatches, link.exchange_seconds)
        compute.add_metric((link.worker,), link.dispatches, link.compute_seconds)
    yield from (up, rows, dispatches, nbytes, exchange, compute)


def _per_worker_counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, text, labels=("worker", *labels))


def _per_worker_summary(name: str, text: str) -> SummaryMetricFamily:
    return SummaryMetricFamily(PREFIX + name, text, labels=("worker",))


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value=value)


def _summary(name: str, text: str, count: int, total: float) -> Metric:
    return SummaryMetricFamily(PREFIX + name, text, count_value=count, sum_value=total)
