"""A release's life by real Helms against an API server: install, upgrade, rollback, test, uninstall."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from router.kubernetes import cluster_side
from router.kubernetes.cluster import Cluster
from router.kubernetes.cluster_side import ClusterSide
from router.kubernetes.discovery import watch_endpoints
from router.kubernetes.node_labels import read_node_labels
from router.kubernetes.pods import GATE, Owner
from router.kubernetes.scaling import read_replicas, write_replicas
from tests.helm import tools
from tests.helm.api_server import ApiServer, Request
from tests.helm.api_store import Object
from tests.helm.pools import LOST, READY, pool, worker
from tests.helm.render import CHART, HELMS

CPU = CHART / "ci/cpu.yaml"
KUBERAY = CHART / "ci/kuberay.yaml"
Ids = set[tuple[str, str, str]]


class HelmFailed(Exception):
    """What Helm wrote on stderr."""


class Helm:
    """One Helm binary in the namespace `prod` of one API server."""

    def __init__(self, major: str, api: ApiServer, home: Path) -> None:
        self.api = api
        self.major = major
        self._binary = tools.helm(major)
        self._environment = {"HOME": str(home), "PATH": os.environ["PATH"], "KUBECONFIG": os.environ["KUBECONFIG"]}

    def __call__(self, *words: str | Path) -> str:
        """Run it; returns its standard output. Raises HelmFailed."""
        command = [self._binary, "--namespace", "prod", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self._environment, timeout=60)
        if done.returncode:
            raise HelmFailed(done.stderr)
        return done.stdout

    def install(self, release: str = "barista", *settings: str, values: Path = CPU) -> None:
        self("install", release, CHART, "--values", values, "--create-namespace", *settings)

    def upgrade(self, release: str = "barista", *settings: str, values: Path = CPU) -> None:
        self("upgrade", release, CHART, "--values", values, *settings)


@pytest.fixture(params=[pytest.param(HELMS[0], marks=pytest.mark.long), HELMS[1]])
def helm(request, api, tmp_path) -> Helm:
    return Helm(request.param, api, tmp_path)


@pytest.fixture
def newest_helm(api, tmp_path) -> Helm:
    return Helm(HELMS[-1], api, tmp_path)


def secrets(api: ApiServer) -> dict[str, Object]:
    """The data of every Secret of the chart: not Helm's own records of its releases."""
    return {
        item["metadata"]["name"]: item["data"]
        for item in api.all("Secret", "prod")
        if item["type"] != "helm.sh/release.v1"
    }


def ids(api: ApiServer) -> Ids:
    """Everything that is there: kind, namespace, name."""
    return {(resource.kind, namespace, name) for resource, namespace, name in api.store.objects}


def specs(api: ApiServer) -> dict[tuple[str, str], Object]:
    """What everything is meant to be, by kind and name; without what controllers and Helm write down for themselves."""
    found = {}
    for (resource, _, name), item in api.store.objects.items():
        if not name.startswith("sh.helm.release") and not item["metadata"].get("ownerReferences"):
            kept = {key: part for key, part in item.items() if key not in ("metadata", "status")}
            metadata = {key: item["metadata"].get(key) for key in ("labels", "annotations")}
            found[resource.kind, name] = json.loads(json.dumps(kept | {"metadata": metadata}))
    return found


def difference(before: Any, after: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """What differs, by its place."""
    if isinstance(before, dict) and isinstance(after, dict):
        pairs = {key: (before.get(key), after.get(key)) for key in before.keys() | after.keys()}
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = dict(enumerate(zip(before, after, strict=True)))
    else:
        return {} if before == after else {path: (before, after)}
    found = {}
    for key, (old, new) in pairs.items():
        found |= difference(old, new, f"{path}.{key}".removeprefix("."))
    return found


def changed_by(api: ApiServer, act: Callable[[], object]) -> dict[tuple[str, str], dict[str, tuple[Any, Any]]]:
    """What the act changes: differences by kind and name."""
    before = specs(api)
    act()
    after = specs(api)
    found = {key: difference(before.get(key), after.get(key)) for key in before.keys() | after.keys()}
    return {key: places for key, places in found.items() if places}


def test_the_generated_secrets_survive_upgrade_and_rollback_byte_for_byte(helm):
    helm.install()
    made = secrets(helm.api)
    assert {"barista-auth", "barista-tls"} <= made.keys()
    assert made["barista-auth"].keys() == {"auth_token", "pool_token", "api_keys", "admin_keys"}
    assert made["barista-tls"].keys() == {"ca.crt", "tls.crt", "tls.key"}
    helm.upgrade("barista", "--set", "workers.replicas=3")
    assert secrets(helm.api) == made
    helm("rollback", "barista", "1")
    assert secrets(helm.api) == made
    helm.upgrade()
    assert secrets(helm.api) == made


def test_each_release_makes_secrets_of_its_own(newest_helm):
    newest_helm.install("one")
    newest_helm.install("two")
    made = secrets(newest_helm.api)
    for part in ("auth_token", "pool_token", "api_keys", "admin_keys"):
        assert len({made["one-barista-auth"][part], made["two-barista-auth"][part]}) == 2
    assert made["one-barista-tls"] != made["two-barista-tls"]


@pytest.mark.parametrize(("major", "values"), [("3", CPU), ("4", CPU), ("4", KUBERAY)])
def test_uninstall_leaves_nothing_behind(api, tmp_path, major, values):
    helm = Helm(major, api, tmp_path)
    helm.api.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "prod"}})
    before = ids(helm.api)
    helm.install(values=values)
    helm.upgrade("barista", "--set", "workers.threads=2", values=values)
    assert len(ids(helm.api)) > len(before) + 10
    helm("uninstall", "barista")
    assert ids(helm.api) == before


def test_two_releases_in_one_namespace_share_nothing(newest_helm):
    api = newest_helm.api
    newest_helm.install("one", "--set", "kubernetes.nodeLabels=true")
    one = ids(api)
    first = specs(api)
    newest_helm.install("two", "--set", "kubernetes.nodeLabels=true")
    assert {key: item for key, item in specs(api).items() if key in first} == first
    for workload in [*api.all("StatefulSet"), *api.all("Deployment")]:
        chosen = workload["spec"]["selector"]["matchLabels"]
        owners = {
            pod["metadata"]["labels"]["app.kubernetes.io/instance"]
            for pod in api.all("Pod")
            if chosen.items() <= pod["metadata"]["labels"].items()
        }
        assert owners <= {workload["metadata"]["labels"]["app.kubernetes.io/instance"]}
    newest_helm("uninstall", "two")
    assert ids(api) == one


def test_an_upgrade_to_the_same_values_changes_nothing(newest_helm):
    newest_helm.install()
    assert changed_by(newest_helm.api, newest_helm.upgrade) == {}


def test_more_worker_pods_change_their_number_and_what_the_deployer_is_told(helm):
    helm.install()
    pods = {key: item["metadata"]["uid"] for key, item in helm.api.store.objects.items() if key[0].kind == "Pod"}
    changes = changed_by(helm.api, lambda: helm.upgrade("barista", "--set", "workers.replicas=3"))
    assert changes.keys() == {("StatefulSet", "barista-worker"), ("Deployment", "barista-deployer")}
    assert changes["StatefulSet", "barista-worker"] == {"spec.replicas": (2, 3)}
    (place,) = changes["Deployment", "barista-deployer"]
    assert changes["Deployment", "barista-deployer"][place] == ("--workers=2", "--workers=3")
    assert pods.items() <= {key: item["metadata"]["uid"] for key, item in helm.api.store.objects.items()}.items()


def test_install_waits_for_pods_and_history_tells_of_each_revision(helm):
    helm.install("barista", "--wait", "--timeout", "30s", "--set", "kubernetes.readinessGates=false")
    helm.upgrade("barista", "--set", "workers.replicas=3")
    helm("rollback", "barista", "1")
    history = json.loads(helm("history", "barista", "--output", "json"))
    assert [(entry["revision"], entry["status"]) for entry in history] == [
        (1, "superseded"),
        (2, "superseded"),
        (3, "deployed"),
    ]
    assert helm.api.get("StatefulSet", "barista-worker", "prod")["spec"]["replicas"] == 2


def test_helm_test_reports_what_became_of_its_pod(helm):
    helm.install()
    assert "Phase:          Succeeded" in helm("test", "barista")
    assert ("Pod", "prod", "barista-test") not in ids(helm.api)
    helm.api.controllers.pod_phase = "Failed"
    with pytest.raises(HelmFailed, match="barista-test"):
        helm("test", "barista")


# The deployer beside Helm.


def roles_allow(api: ApiServer) -> Callable[[Request], bool]:
    """Whether some Role or ClusterRole of the release allows a request."""
    rules = [
        (rule, role["metadata"].get("namespace", ""))
        for kind in ("Role", "ClusterRole")
        for role in api.all(kind)
        for rule in role["rules"]
    ]

    def allow(request: Request) -> bool:
        return any(
            request.verb in rule["verbs"]
            and request.group in rule["apiGroups"]
            and request.resource in rule["resources"]
            and request.name in rule.get("resourceNames", [request.name])
            and where in ("", request.namespace)
            for rule, where in rules
        )

    return allow


async def observe_for_a_while(api: ApiServer, side: ClusterSide, until: Callable[[], bool], waiting: int) -> None:
    """One worker in each worker pod: all ready, but the first is lost and found now and then."""
    async with asyncio.timeout(10):
        for turn in range(1000):
            if until():
                return
            pods = [pod for pod in api.all("Pod", "prod") if "-worker-" in pod["metadata"]["name"]]
            states = [LOST if turn % 50 == 40 and not number else READY for number in range(len(pods))]
            workers = [worker(n, state, f"{pods[n]['status']['podIP']}:1") for n, state in enumerate(states)]
            await side.observe(pool(*workers), waiting)
            await asyncio.sleep(0.01)


async def everything_that_calls_kubernetes(api: ApiServer) -> None:
    """What pods of the release ask of the API server: router, deployer and a Ray pod's first container."""
    api.put(
        {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1", "labels": {"kubernetes.io/hostname": "n"}}}
    )
    assert await read_node_labels("node-1")
    stream = watch_endpoints("prod", "barista-ray", "engine")
    pods = [pod for pod in api.all("Pod", "prod") if pod["metadata"]["labels"].get("barista.dev/ray") == "node"]
    assert await anext(stream) == {f"{pod['status']['podIP']}:50051" for pod in pods}
    assert len(pods) == 2
    listening = asyncio.create_task(anext(stream))
    side = ClusterSide("prod", "barista", groups=(1, 1, 3))
    try:
        last = {
            ("watch", "endpointslices"),
            ("create", "events"),
            ("patch", "pods/status"),
            ("patch", "statefulsets/scale"),
        }
        await observe_for_a_while(
            api,
            side,
            lambda: last <= {(request.verb, request.resource) for request in api.requests},
            waiting=99,
        )
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await stream.aclose()
        await side.aclose()


AUTOSCALING = (
    "--set-json",
    'workers.autoscaling={"enabled":true,"minReplicas":1,"maxReplicas":3}',
    "--set",
    "kubernetes.nodeLabels=true",
)


@pytest.fixture
def quick_scaling(monkeypatch):
    monkeypatch.setattr(cluster_side, "LIST_SECONDS", 0.02)
    limits = cluster_side.Limits
    monkeypatch.setattr(cluster_side, "Limits", lambda **pods: limits(**pods, up_seconds=0.1))


def test_the_roles_allow_what_the_code_asks_for_and_nothing_else(newest_helm, quick_scaling):
    api = newest_helm.api
    newest_helm.install("barista", *AUTOSCALING)
    allow = roles_allow(api)
    refused = []
    api.deny(lambda request: bool(request.token) and not allow(request) and not refused.append(request))
    api.requests.clear()
    asyncio.run(everything_that_calls_kubernetes(api))
    assert refused == []
    asked = {(request.verb, request.group, request.resource) for request in api.requests if request.token}
    granted = {
        (verb, group, resource)
        for kind in ("Role", "ClusterRole")
        for role in api.all(kind)
        for rule in role["rules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert granted == asked


def test_an_upgrade_keeps_the_readiness_that_the_deployer_has_set_and_the_pods_it_has_added(helm, quick_scaling):
    api = helm.api
    helm.install("barista", *AUTOSCALING)

    async def scale_up() -> None:
        side = ClusterSide("prod", "barista", groups=(1, 1, 3))
        try:
            await observe_for_a_while(api, side, lambda: replicas() == 3 and all(loaded()), waiting=99)
        finally:
            await side.aclose()

    def replicas() -> int:
        return api.get("StatefulSet", "barista-worker", "prod")["spec"]["replicas"]

    def loaded() -> list[bool]:
        pods = [pod for pod in api.all("Pod", "prod") if "-worker-" in pod["metadata"]["name"]]
        return [{"type": GATE, "status": "True"}.items() <= gate(pod).items() for pod in pods]

    def gate(pod: Object) -> Object:
        return next((one for one in pod["status"]["conditions"] if one["type"] == GATE), {})

    asyncio.run(scale_up())
    assert len(loaded()) == 3
    helm.upgrade("barista", *AUTOSCALING, "--set", "router.replicas=2")
    assert replicas() == 3
    assert loaded() == [True] * 3
    # Helm 4 applies on the server's side, where a field that another manager has changed is not taken back unasked.
    helm("rollback", "barista", "1", *(["--force-conflicts"] if helm.major == "4" else []))
    assert loaded() == [True] * replicas()


def test_a_ray_cluster_keeps_the_pods_that_the_deployer_has_added(helm):
    """To the server its worker groups are one field: Helm 4 has to be told to take it back, and puts the number in."""

    async def scale(replicas: int) -> None:
        cluster = await Cluster.connect()
        try:
            uid = helm.api.get("RayCluster", "barista", "prod")["metadata"]["uid"]
            owner = Owner(api_version="ray.io/v1", kind="RayCluster", name="barista", uid=uid)
            seen = await read_replicas(cluster, "prod", owner)
            assert await write_replicas(cluster, "prod", owner, replicas, seen)
        finally:
            await cluster.close()

    helm.install(values=KUBERAY)
    asyncio.run(scale(4))
    new_image = ("--set", "image.tag=new")
    if helm.major == "4":
        with pytest.raises(HelmFailed, match="workerGroupSpecs"):
            helm.upgrade("barista", *new_image, values=KUBERAY)
        new_image += ("--force-conflicts",)
    helm.upgrade("barista", *new_image, values=KUBERAY)
    (group,) = helm.api.get("RayCluster", "barista", "prod")["spec"]["workerGroupSpecs"]
    assert group["replicas"] == 4
    assert group["template"]["spec"]["containers"][0]["image"].endswith(":new")
    # Back at the least number of pods, one of them may still be evicted.
    asyncio.run(scale(2))
    budget = helm.api.get("PodDisruptionBudget", "barista-worker", "prod")["spec"]
    assert budget["minAvailable"] == 1
