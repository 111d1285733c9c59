"""Writes the Grafana dashboard from the metrics that the router exposes: python helm/dashboard.py > FILE

A panel names its metrics; their types, labels and descriptions are those of barista.metrics, and decide the query. With
several routers, what a router counts of its own requests is added up, and what every router tells of the same engine
and pool is taken once, as the largest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from barista.gpu_metrics import COUNTERS, GAUGES, GpuStats
from barista.metrics import PREFIX, Metrics
from router.messages import ExpertCacheStats, LinkStats, PoolStats, Stats

# Of each router's own requests, though the engine's collector tells them.
OWN_GAUGES = ("num_requests_running", "num_requests_waiting")
SELECTOR = 'namespace="$namespace",service="$service"'
WINDOW = "$__rate_interval"
COLUMNS, HEIGHT = 3, 8
OF_GPU, GPU = ("worker", "gpu"), "{{worker}} GPU {{gpu}}"
WIDTH = 24 // COLUMNS


@dataclass(frozen=True)
class Family:
    """A metric as it is exposed. name: without prefix and suffixes. labels: all that its samples carry.

    own: told by each router of its own requests; otherwise of an engine that all of them see.
    """

    name: str
    type: str
    help: str
    labels: frozenset[str]
    own: bool

    def selector(self, suffix: str = "") -> str:
        """Its samples as PromQL."""
        return f"{PREFIX}{self.name}{suffix}{{{SELECTOR}}}"


@cache
def families() -> dict[str, Family]:
    """Every metric of a router whose engine has a pool of workers on GPUs and a limit on the experts in memory."""
    metrics = Metrics()
    metrics.request_success.labels("stop")
    metrics.request_failure.labels("internal")
    link = LinkStats("worker-0", "shm", "ready", 1, 1, 1, 1, 1.0, 1.0)
    pool = PoolStats(
        epoch=1, experts_uncovered=0, resends=1, hedges=1, stale_epochs=1, nonfinite_rows=1, on_demand_loads=1,
        layers=1, dispatch_seconds=1.0, combine_seconds=1.0, links=(link,),
    )  # fmt: skip
    cache = ExpertCacheStats(queries=1, hits=1, resident_bytes=1)
    stats = Stats(expert_tokens=((1, 1), (1, 1)), pool=pool, expert_cache=cache, group_workers=1)
    told: dict[str, Any] = dict.fromkeys((*GAUGES, *COUNTERS), 1)
    gpu = GpuStats(worker="worker-0", index=0, uuid="GPU-0", reachable=True, xids={79: 1}, **told)
    own = {*_names(metrics.exposition(None)), *OWN_GAUGES}
    return {
        name: Family(name=name, type=kind, help=text, labels=labels, own=name in own)
        for name, (kind, text, labels) in _names(metrics.exposition(stats, moves=1, gpus=[gpu])).items()
    }


def _names(exposition: bytes) -> dict[str, tuple[str, str, frozenset[str]]]:
    """Name -> type, description, labels. Without the times at which counters were made."""
    found = {}
    for family in text_string_to_metric_families(exposition.decode()):
        labels = frozenset(label for sample in family.samples for label in sample.labels)
        if not family.name.endswith("_created"):
            found[family.name.removeprefix(PREFIX)] = family.type, family.documentation, labels
    return found


# ---- queries. by: the labels to keep.


def value(name: str, *by: str) -> str:
    """A gauge, now."""
    return _merged(_family(name, "gauge"), _family(name, "gauge").selector(), by)


def rate(name: str, *by: str) -> str:
    """A counter's growth, per second."""
    return _merged(_family(name, "counter"), f"rate({_family(name, 'counter').selector('_total')}[{WINDOW}])", by)


def quantile(share: float, name: str) -> str:
    """Of a histogram over all routers."""
    buckets = _family(name, "histogram").selector("_bucket")
    return f"histogram_quantile({share}, sum by (le) (rate({buckets}[{WINDOW}])))"


def mean(name: str, *by: str) -> str:
    """Of a summary: its sum over its count."""
    family = _family(name, "summary")
    parts = (_merged(family, f"rate({family.selector(suffix)}[{WINDOW}])", by) for suffix in ("_sum", "_count"))
    return " / ".join(parts)


def per_second(name: str, *by: str) -> str:
    """Of a summary: how often it was observed."""
    family = _family(name, "summary")
    return _merged(family, f"rate({family.selector('_count')}[{WINDOW}])", by)


def _merged(family: Family, query: str, by: tuple[str, ...]) -> str:
    unknown = set(by) - family.labels
    if unknown:
        raise ValueError(f"{family.name} has no label {sorted(unknown)}, but {sorted(family.labels)}")
    operator = "sum" if family.own else "max"
    return f"{operator} by ({', '.join(by)}) ({query})" if by else f"{operator}({query})"


def _family(name: str, kind: str) -> Family:
    family = families().get(name)
    if family is None:
        raise ValueError(f"barista.metrics has no metric {name}")
    if family.type != kind:
        raise ValueError(f"{name} is a {family.type}, not a {kind}")
    return family


# ---- what is shown


@dataclass(frozen=True)
class Panel:
    """A chart. unit: Grafana's id. queries: legend -> PromQL. about: the metric whose description it carries."""

    title: str
    unit: str
    queries: dict[str, str] = field(hash=False)
    about: str


def quantiles(title: str, name: str) -> Panel:
    """A histogram: three of its quantiles."""
    return Panel(title, "s", {f"p{share * 100:.0f}": quantile(share, name) for share in (0.5, 0.9, 0.99)}, name)


def of_each_gpu(title: str, unit: str, name: str) -> Panel:
    """A gauge of GPUs: a line for each."""
    return Panel(title, unit, {GPU: value(name, *OF_GPU)}, name)


def rows() -> dict[str, list[Panel]]:
    """The dashboard: row -> panels."""
    return {
        "Traffic": [
            Panel(
                "Answers",
                "reqps",
                {"{{finished_reason}}": rate("request_success", "finished_reason")},
                "request_success",
            ),
            Panel("Failures", "reqps", {"{{code}}": rate("request_failure", "code")}, "request_failure"),
            Panel(
                "Requests at once",
                "short",
                {"running": value("num_requests_running"), "waiting": value("num_requests_waiting")},
                "num_requests_waiting",
            ),
            Panel("Routers with an engine", "short", {"routers": value("engine_up")}, "engine_up"),
            Panel(
                "Tokens",
                "tokens/s",
                {"prompt": rate("prompt_tokens"), "generated": rate("generation_tokens")},
                "generation_tokens",
            ),
        ],
        "Latency": [
            quantiles("Time to first token", "time_to_first_token_seconds"),
            quantiles("Between tokens", "inter_token_latency_seconds"),
            quantiles("Whole request", "e2e_request_latency_seconds"),
        ],
        "Engine": [
            Panel("KV cache in use", "percentunit", {"used": value("kv_cache_usage_perc")}, "kv_cache_usage_perc"),
            Panel(
                "Prompt tokens found in the cache",
                "percentunit",
                {"hits": f"{rate('prefix_cache_hits')} / {rate('prefix_cache_queries')}"},
                "prefix_cache_hits",
            ),
            Panel("Preemptions", "ops", {"preemptions": rate("num_preemptions")}, "num_preemptions"),
            Panel("Step", "s", {"mean": mean("step_seconds")}, "step_seconds"),
            Panel("Steps", "ops", {"steps": per_second("step_seconds")}, "step_seconds"),
            Panel("Tokens in a step", "short", {"mean": mean("iteration_tokens_total")}, "iteration_tokens_total"),
        ],
        "Experts": [
            Panel("Uncovered experts", "short", {"uncovered": value("experts_uncovered")}, "experts_uncovered"),
            Panel(
                "Imbalance by layer",
                "short",
                {"layer {{layer}}": value("expert_load_imbalance", "layer")},
                "expert_load_imbalance",
            ),
            Panel(
                "The ten busiest experts",
                "tokens/s",
                {"{{layer}}/{{expert}}": f"topk(10, {rate('expert_tokens', 'layer', 'expert')})"},
                "expert_tokens",
            ),
            Panel(
                "Experts found in memory",
                "percentunit",
                {"hits": f"{rate('expert_cache_hits')} / {rate('expert_cache_queries')}"},
                "expert_cache_hits",
            ),
            Panel("Memory of experts", "bytes", {"resident": value("expert_cache_bytes")}, "expert_cache_bytes"),
        ],
        "Pool": [
            Panel("Placement", "short", {"epoch": value("placement_epoch")}, "placement_epoch"),
            Panel("Replicas moved", "ops", {"moves": rate("placement_moves")}, "placement_moves"),
            Panel(
                "Sent again",
                "ops",
                {
                    "after a failure": rate("resends"),
                    "because of a slow worker": rate("hedges"),
                    "for a newer placement": rate("stale_epochs"),
                },
                "resends",
            ),
            Panel("Loaded while a step waited", "ops", {"experts": rate("on_demand_loads")}, "on_demand_loads"),
            Panel("Rows that were not finite", "ops", {"rows": rate("nonfinite_expert_rows")}, "nonfinite_expert_rows"),
            Panel(
                "One layer",
                "s",
                {"dispatch": mean("dispatch_seconds"), "combine": mean("combine_seconds")},
                "combine_seconds",
            ),
        ],
        "Workers": [
            Panel(
                "Answering in time",
                "short",
                {"{{worker}} ({{transport}})": value("worker_up", "worker", "transport")},
                "worker_up",
            ),
            Panel("Imbalance", "short", {"busiest / average": value("worker_load_imbalance")}, "worker_load_imbalance"),
            Panel("Rows", "ops", {"{{worker}}": rate("worker_rows", "worker")}, "worker_rows"),
            Panel("Dispatches", "ops", {"{{worker}}": rate("worker_dispatches", "worker")}, "worker_dispatches"),
            Panel(
                "Wire", "Bps", {"{{worker}} {{direction}}": rate("worker_bytes", "worker", "direction")}, "worker_bytes"
            ),
            Panel(
                "Exchange", "s", {"{{worker}}": mean("worker_exchange_seconds", "worker")}, "worker_exchange_seconds"
            ),
            Panel("Compute", "s", {"{{worker}}": mean("worker_compute_seconds", "worker")}, "worker_compute_seconds"),
        ],
        "GPUs": [
            Panel(
                "Memory",
                "percentunit",
                {GPU: f"{value('gpu_memory_used_bytes', *OF_GPU)} / {value('gpu_memory_total_bytes', *OF_GPU)}"},
                "gpu_memory_used_bytes",
            ),
            Panel("Workers of engines on GPUs", "short", {"workers": value("group_workers")}, "group_workers"),
            Panel(
                "Their losses",
                "ops",
                {"workers lost": rate("group_workers_lost"), "steps computed again": rate("recomputed_steps")},
                "group_workers_lost",
            ),
            of_each_gpu("Utilization", "percentunit", "gpu_utilization"),
            of_each_gpu("Temperature", "celsius", "gpu_temperature_celsius"),
            of_each_gpu("Slowed down", "short", "gpu_throttled"),
            Panel(
                "Memory errors",
                "ops",
                {
                    f"{GPU} corrected": rate("gpu_ecc_corrected", *OF_GPU),
                    f"{GPU} uncorrectable": rate("gpu_ecc_uncorrected", *OF_GPU),
                },
                "gpu_ecc_uncorrected",
            ),
            Panel(
                "NVLinks",
                "short",
                {
                    f"{GPU} up": value("gpu_nvlinks_active", *OF_GPU),
                    f"{GPU} errors a second": rate("gpu_nvlink_errors", *OF_GPU),
                },
                "gpu_nvlink_errors",
            ),
            Panel("XIDs", "ops", {f"{GPU}: {{{{xid}}}}": rate("gpu_xid", *OF_GPU, "xid")}, "gpu_xid"),
            of_each_gpu("Reached by the driver", "short", "gpu_up"),
            Panel(
                "What the driver asks for",
                "short",
                {
                    f"{GPU} recovery action": value("gpu_recovery_action", *OF_GPU),
                    f"{GPU} rows to remap": value("gpu_rows_pending", *OF_GPU),
                },
                "gpu_recovery_action",
            ),
        ],
    }


# ---- Grafana's JSON


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it, the same each time."""
    return {
        "uid": "barista",
        "title": "Barista",
        "tags": ["barista"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": list(_panels()),
    }


def _variables() -> list[dict[str, Any]]:
    metric = f"{PREFIX}{families()['prompt_tokens'].name}_total"
    common = {"type": "query", "datasource": _datasource(), "refresh": 2, "sort": 1}
    services = f'label_values({metric}{{namespace="$namespace"}}, service)'
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        {**common, "name": "namespace", "label": "Namespace", "query": f"label_values({metric}, namespace)"},
        {**common, "name": "service", "label": "Router", "query": services},
    ]


def _datasource() -> dict[str, str]:
    return {"type": "prometheus", "uid": "${datasource}"}


def _panels() -> Iterator[dict[str, Any]]:
    top, number = 0, 0
    for title, panels in rows().items():
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": _grid(0, top, 24, 1),
        }
        top += 1
        for index, panel in enumerate(panels):
            number += 1
            position = _grid(index % COLUMNS * WIDTH, top + index // COLUMNS * HEIGHT, WIDTH, HEIGHT)
            yield {"id": number, **_chart(panel), "gridPos": position}
        top += -(-len(panels) // COLUMNS) * HEIGHT


def _grid(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _chart(panel: Panel) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + index), "datasource": _datasource(), "expr": query, "legendFormat": legend}
        for index, (legend, query) in enumerate(panel.queries.items())
    ]
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": families()[panel.about].help,
        "datasource": _datasource(),
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


if __name__ == "__main__":
    json.dump(dashboard(), sys.stdout, indent=2)
    sys.stdout.write("\n")
