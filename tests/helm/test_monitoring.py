"""Dashboard, alerts, monitors: their names exist, every metric is shown, and alerts fire when they should."""

from __future__ import annotations

import json
import re
from typing import Any

import promql_parser as promql
import pytest

from barista.metrics import PREFIX
from router import dashboard
from tests.helm import promql as query_language
from tests.helm.promql import Samples, evaluate, function, grouping, selectors
from tests.helm.render import CHART, FULLNAME, NAMESPACE, named, of_kind, render

ROOT = CHART.parents[1]
# What Prometheus' operator puts on every series of a ServiceMonitor.
TARGET_LABELS = {"namespace", "service", "pod"}
MONITORED = "kuberay.yaml"


FILE = CHART / "dashboards/barista.json"
PANELS = [panel for panel in json.loads(FILE.read_text())["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


def rules() -> dict[str, dict[str, Any]]:
    (rule,) = of_kind(render(MONITORED), "PrometheusRule")
    return {alert["alert"]: alert for group in rule["spec"]["groups"] for alert in group["rules"]}


ALERTS = rules()
ALL_QUERIES = [*QUERIES, *((name, alert["expr"]) for name, alert in ALERTS.items())]


def family(sample_name: str) -> tuple[str, str]:
    """Name and suffix of the metric that has samples of this name."""
    name = sample_name.removeprefix(PREFIX)
    suffixes = {"counter": ("_total",), "gauge": ("",), "summary": ("_sum", "_count"), "histogram": ("_bucket",)}
    for known in dashboard.families().values():
        for suffix in suffixes[known.type]:
            if name == known.name + suffix:
                return known.name, suffix
    raise AssertionError(f"no router exposes {sample_name}")


# ---- names


def test_the_file_is_what_the_generator_writes():
    """If not: make dashboard"""
    assert FILE.read_text() == json.dumps(dashboard.dashboard(), indent=2) + "\n"


@pytest.mark.parametrize(("title", "query"), ALL_QUERIES, ids=[title for title, _ in ALL_QUERIES])
def test_a_query_reads_only_metrics_and_labels_that_exist(title: str, query: str):
    found = list(selectors(query))
    assert found
    for selector, above in found:
        labels = set(TARGET_LABELS)
        if selector.name != "up":
            labels |= dashboard.families()[family(selector.name)[0]].labels
        used = {matcher.name for matcher in selector.matchers.matchers}
        used |= {label for node in above for label in grouping(node)}
        assert used <= labels, (title, used - labels)
        assert {"namespace", "service"} <= used, f"{title} would take other releases' metrics"


def test_a_name_that_does_not_exist_is_found():
    with pytest.raises(AssertionError, match="barista:tokens_total"):
        family("barista:tokens_total")
    with pytest.raises(ValueError, match="no metric"):
        dashboard.value("tokens")
    with pytest.raises(ValueError, match="has no label"):
        dashboard.rate("worker_rows", "expert")


def test_every_metric_is_shown():
    shown = {family(selector.name)[0] for _, query in QUERIES for selector, _ in selectors(query)}
    assert shown == dashboard.families().keys()


def test_the_dashboard_has_the_rows_that_it_promises_and_no_two_panels_overlap():
    panels = json.loads(FILE.read_text())["panels"]
    titles = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert titles == ["Traffic", "Latency", "Engine", "Experts", "Pool", "Workers", "GPUs"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


# ---- how metrics are used


@pytest.mark.parametrize(("title", "query"), ALL_QUERIES, ids=[title for title, _ in ALL_QUERIES])
def test_a_metric_is_used_as_its_type_asks(title: str, query: str):
    """Counters by growth, histograms by quantiles; routers' own metrics are added up, the engine's are taken once."""
    for selector, above in selectors(query):
        if selector.name == "up":
            continue
        known = dashboard.families()[family(selector.name)[0]]
        functions = [function(node) for node in above]
        grows = bool({"rate", "increase"} & set(functions))
        assert grows == (known.type != "gauge"), title
        if known.type == "histogram":
            assert functions[0] == "histogram_quantile"
            assert "le" in grouping(above[[*functions].index("sum")])
        merged = [name for name in functions if name in ("sum", "max", "avg")]
        if title != "BaristaRouterNotReady":  # tells of each router
            assert merged[-1] == ("sum" if known.own else "max") or selector.name == "barista:engine_up", title


# ---- alerts


def test_every_alert_says_how_bad_it_is_and_what_to_do():
    runbook = (ROOT / "docs/kubernetes.md").read_text()
    anchors = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", runbook, re.MULTILINE)
    }
    for name, alert in ALERTS.items():
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert re.fullmatch(r"\d+m", alert["for"])
        assert alert["annotations"]["summary"].endswith(".")
        file, _, anchor = alert["annotations"]["runbook"].partition("#")
        assert file == "docs/kubernetes.md"
        assert anchor in anchors, name
        used = set(re.findall(r"\$labels\.(\w+)", alert["annotations"]["summary"]))
        assert used <= ({"pod"} if name == "BaristaRouterNotReady" else set())


def test_a_runbook_of_ones_own_is_linked():
    (rule,) = of_kind(render(MONITORED, "monitoring.rules.runbookUrl=https://wiki/barista"), "PrometheusRule")
    (down,) = (rule for rule in rule["spec"]["groups"][0]["rules"] if rule["alert"] == "BaristaRouterDown")
    assert down["annotations"]["runbook_url"] == "https://wiki/barista#baristarouterdown"


ROUTERS = [{"namespace": NAMESPACE, "service": FULLNAME, "pod": pod} for pod in ("router-a", "router-b")]


def seen(value: float | tuple[float, float], **labels: str) -> list[tuple[dict[str, str], float]]:
    """One metric of both routers."""
    values = value if isinstance(value, tuple) else (value, value)
    return [({**router, **labels}, each) for router, each in zip(ROUTERS, values, strict=True)]


def per_worker(*values: float, **labels: str) -> list[tuple[dict[str, str], float]]:
    return [sample for index, value in enumerate(values) for sample in seen(value, worker=f"worker-{index}", **labels)]


HEALTHY: dict[str, list[tuple[dict[str, str], float]]] = {
    "up": seen(1),
    "barista:engine_up": seen(1),
    "barista:experts_uncovered": seen(0),
    "barista:worker_up": per_worker(1, 1, transport="grpc"),
    "barista:worker_rows_total": per_worker(800, 1000),
    "barista:worker_dispatches_total": per_worker(400, 400),
    "barista:num_requests_waiting": seen((3, 8)),
    "barista:request_success_total": seen(2, finished_reason="stop"),
    "barista:request_failure_total": seen(5, code="invalid_request") + seen(5, code="client_disconnected"),
    "barista:kv_cache_usage_perc": seen(0.8),
    "barista:resends_total": seen(0.1),
    "barista:hedges_total": seen(2),
    "barista:nonfinite_expert_rows_total": seen(0),
}
# Another release, in every kind of trouble.
ELSEWHERE: Samples = {
    name: [({**labels, "namespace": "other"}, 10.0) for labels, _ in HEALTHY[name]] for name in HEALTHY
}

TROUBLE: dict[str, tuple[dict[str, list[tuple[dict[str, str], float]]], set[str]]] = {
    "no router answers": (
        {name: seen(0) if name == "up" else [] for name in HEALTHY},
        {"BaristaRouterDown", "BaristaRouterNotReady"},
    ),
    "no router is known": ({name: [] for name in HEALTHY}, {"BaristaRouterDown"}),
    "one router does not answer": ({"up": seen((1, 0))}, {"BaristaRouterNotReady"}),
    "no router has an engine": ({"barista:engine_up": seen(0)}, {"BaristaEngineGone", "BaristaRouterNotReady"}),
    "one router has no engine": ({"barista:engine_up": seen((1, 0))}, {"BaristaRouterNotReady"}),
    "one router reaches no holder of an expert": (
        {"barista:experts_uncovered": seen((0, 1))},
        {"BaristaExpertsUncovered"},
    ),
    "a worker is late": ({"barista:worker_up": per_worker(1, 0, transport="grpc")}, {"BaristaWorkerLost"}),
    "a worker is forgotten": ({"barista:worker_up": per_worker(1, transport="grpc")}, {"BaristaWorkerLost"}),
    "one of three workers computes nearly all": (
        {"barista:worker_rows_total": per_worker(900, 50, 50)},
        {"BaristaImbalance"},
    ),
    "requests wait": ({"barista:num_requests_waiting": seen((20, 20))}, {"BaristaQueueLong"}),
    "one in ten fails": ({"barista:request_failure_total": seen(0.25, code="engine_dead")}, {"BaristaErrors"}),
    "all fail": (
        {"barista:request_failure_total": seen(1, code="overloaded"), "barista:request_success_total": []},
        {"BaristaErrors"},
    ),
    "the KV cache is full": ({"barista:kv_cache_usage_perc": seen(0.99)}, {"BaristaKVCachePressure"}),
    "dispatches fail": ({"barista:resends_total": seen(60)}, {"BaristaResends"}),
    "dispatches are slow": ({"barista:hedges_total": seen(60)}, {"BaristaResends"}),
    "rows are broken": ({"barista:nonfinite_expert_rows_total": seen(0.01)}, {"BaristaNonfiniteRows"}),
}


def firing(changed: Samples) -> set[str]:
    """The alerts that fire."""
    samples = {name: [*changed.get(name, HEALTHY[name]), *ELSEWHERE[name]] for name in HEALTHY}
    return {name for name, alert in ALERTS.items() if evaluate(alert["expr"], samples)}


def test_a_healthy_release_is_silent_whatever_another_one_does():
    assert firing({}) == set()


@pytest.mark.parametrize(("changed", "expected"), TROUBLE.values(), ids=TROUBLE)
def test_trouble_fires_its_alerts_and_no_others(changed: Samples, expected: set[str]):
    assert firing(changed) == expected


def test_every_alert_has_its_trouble():
    assert set.union(*(expected for _, expected in TROUBLE.values())) == ALERTS.keys()


def test_thresholds_are_values():
    setting = 'monitoring.rules.thresholds={"queue": 5, "kvUsage": 0.5}'
    (rule,) = of_kind(render(MONITORED, setting), "PrometheusRule")
    loud = {alert["alert"] for alert in rule["spec"]["groups"][0]["rules"] if evaluate(alert["expr"], HEALTHY)}
    assert loud == {"BaristaQueueLong", "BaristaKVCachePressure"}


def test_the_evaluator_knows_the_corners_that_alerts_use():
    assert evaluate("absent(x)", {}) == [({}, 1.0)]
    assert evaluate("sum(x) or vector(0)", {}) == [({}, 0.0)]
    assert evaluate("sum(x) / sum(x) > 0.5", {"x": [({}, 0.0)]}) == []
    assert evaluate('x{a!~"b|c"} == 1', {"x": [({"a": "b"}, 1.0), ({"a": "d"}, 1.0)]}) == [({"a": "d"}, 1.0)]
    assert evaluate("max by (a) (x)", {"x": [({"a": "b", "c": "d"}, 1.0), ({"a": "b"}, 2.0)]}) == [({"a": "b"}, 2.0)]
    with pytest.raises(ValueError):
        query_language.parse("sum(x")
    assert isinstance(query_language.parse("x"), promql.Expr)


# ---- the objects


def test_nothing_is_monitored_unless_asked():
    kinds = {document["kind"] for document in render("cpu.yaml")}
    assert not kinds & {"ServiceMonitor", "PodMonitor", "PrometheusRule", "ConfigMap"}


def test_prometheus_shows_a_key_to_the_port_that_asks_for_one():
    documents = render(MONITORED)
    (monitor,) = of_kind(documents, "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    secret = endpoint["authorization"]["credentials"]
    assert secret["key"] in named(documents, "Secret", "auth")["data"]
    assert secret["name"] == f"{FULLNAME}-auth"
    services = [d for d in of_kind(documents, "Service") if selects(monitor, d["metadata"]["labels"])]
    assert [service["metadata"]["name"] for service in services] == [FULLNAME]
    assert endpoint["port"] in [port["name"] for port in services[0]["spec"]["ports"]]


def test_the_pod_monitor_takes_every_ray_pod_and_no_other():
    documents = render(MONITORED)
    (monitor,) = of_kind(documents, "PodMonitor")
    (cluster,) = of_kind(documents, "RayCluster")
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    for template in (group["template"] for group in groups):
        assert selects(monitor, template["metadata"]["labels"])
        ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
        assert ports[monitor["spec"]["podMetricsEndpoints"][0]["port"]] == 8080
    router = named(documents, "Deployment", "router")["spec"]["template"]
    assert not selects(monitor, router["metadata"]["labels"])
    everything = [f"monitoring.{name}.enabled=true" for name in ("serviceMonitor", "podMonitor", "rules", "dashboard")]
    assert not list(of_kind(render("external.yaml", *everything), "PodMonitor"))


def test_grafana_gets_the_dashboard_whole():
    (config,) = of_kind(render(MONITORED), "ConfigMap")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(config["data"]["barista.json"]) == dashboard.dashboard()


def selects(monitor: dict[str, Any], labels: dict[str, str]) -> bool:
    return monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
