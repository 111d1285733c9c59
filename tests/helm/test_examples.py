"""The files of examples/: manifests that Kubernetes takes, values that render, commands that exist where they run."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ray
import typer.main
import yaml
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, create_package

from router.cli import app
from tests.helm import kinds
from tests.helm.flows import Peer, allowed
from tests.helm.render import CHART, FULLNAME, NAMESPACE, containers, named, of_kind, pod_templates, render

ROOT = CHART.parents[1]
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
DOCUMENTS = {path.name: list(yaml.safe_load_all(path.read_text())) for path in EXAMPLES}
MANIFESTS = [name for name, documents in DOCUMENTS.items() if "kind" in documents[0]]
VALUES = [name for name in DOCUMENTS if name not in MANIFESTS]
RAY_JOBS = [name for name in MANIFESTS if DOCUMENTS[name][0]["kind"] == "RayJob"]
RELEASE = "barista"  # of which the manifests speak
COMMANDS = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_there_is_a_file_for_each_thing_that_the_docs_promise():
    assert MANIFESTS == ["job-bench.yaml", "job-submit.yaml", "rayjob-ephemeral.yaml", "rayjob.yaml"]
    assert VALUES == ["gateway-api.yaml", "kueue.yaml", "rdma.yaml", "volcano.yaml"]
    docs = (ROOT / "docs/kubernetes.md").read_text()
    assert all(f"examples/{name}" in docs for name in DOCUMENTS)


# ---- manifests


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The PodTemplateSpecs of a manifest."""
    spec = document["spec"]
    cluster = spec.get("rayClusterSpec", {})
    groups = [cluster.get("headGroupSpec"), *cluster.get("workerGroupSpecs", [])]
    templates = [
        spec.get("template"),
        spec.get("submitterPodTemplate"),
        *(group and group["template"] for group in groups),
    ]
    return [template for template in templates if template]


def submitted(document: dict[str, Any]) -> list[str]:
    """The command that does the work: of the container, or of the Ray job that it submits."""
    if document["kind"] == "RayJob":
        return shlex.split(document["spec"]["entrypoint"])
    container = document["spec"]["template"]["spec"]["containers"][0]
    words = [*container["command"], *container["args"]]
    return words[words.index("--") + 1 :] if "--" in words else words


@pytest.mark.parametrize("version", kinds.VERSIONS)
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_what_its_kind_takes(name: str, version: str):
    for document in DOCUMENTS[name]:
        assert kinds.problems(document, version) == []
        if "rayClusterSpec" in document["spec"]:
            cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "x"}}
            assert kinds.problems({**cluster, "spec": document["spec"]["rayClusterSpec"]}, version) == []


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_pod_keeps_to_the_restricted_standard(name: str):
    for template in (pod for document in DOCUMENTS[name] for pod in pods(document)):
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(template):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert {"/tmp", "/home/barista"} <= {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_command_is_in_the_image(name: str):
    """Which holds the packages of pyproject.toml, and neither benchmarks/ nor tests/."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert not any("benchmarks".startswith(pattern.rstrip("*")) for pattern in packages)
    for document in DOCUMENTS[name]:
        program, command, *rest = submitted(document)
        assert program == "barista"
        assert command in COMMANDS
        known = {
            option for parameter in typer.main.get_command(app).commands[command].params for option in parameter.opts
        }  # type: ignore[attr-defined]
        assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known


@pytest.mark.parametrize("name", MANIFESTS)
def test_what_a_manifest_names_is_what_a_release_called_barista_has(name: str):
    documents = render("cpu.yaml", f"fullnameOverride={RELEASE}")
    names = {(d["kind"], d["metadata"]["name"]) for d in documents}
    (head,) = pod_templates(documents)["head"]["spec"]["containers"]
    text = (CHART / "examples" / name).read_text()
    for template in (pod for document in DOCUMENTS[name] for pod in pods(document)):
        for container in containers(template):
            assert container["image"] == head["image"]
            for variable in container.get("env", []):
                if "valueFrom" in variable:
                    secret = variable["valueFrom"]["secretKeyRef"]
                    (found,) = (d for d in of_kind(documents, "Secret") if d["metadata"]["name"] == secret["name"])
                    assert secret["key"] in found["data"]
    for service, port in (("barista-head", 8265), ("barista", 8000)):
        assert set(re.findall(rf"http://{service}:(\d+)", text)) <= {str(port)}
        assert ("Service", service) in names
    for document in of_kind(DOCUMENTS[name], "RayJob"):
        selector = document["spec"].get("clusterSelector")
        assert selector in (None, {"ray.io/cluster": RELEASE})
        spec = document["spec"].get("rayClusterSpec")
        assert spec is None or spec["rayVersion"] == ray.__version__


def test_a_submitting_pod_reaches_the_dashboard_and_nothing_else_of_the_release():
    policies = list(of_kind(render("cpu.yaml"), "NetworkPolicy"))
    head = Peer(pod_templates(render("cpu.yaml"))["head"]["metadata"]["labels"], NAMESPACE)
    for name in ("job-submit.yaml", "rayjob.yaml"):
        (template,) = pods(DOCUMENTS[name][0])
        submitter = Peer(template["metadata"]["labels"], NAMESPACE)
        assert allowed(policies, submitter, head, 8265), name
        assert not allowed(policies, submitter, head, 6379), name
    assert not allowed(policies, Peer({}, NAMESPACE), head, 8265)


def test_a_job_is_submitted_once():
    for name in ("job-submit.yaml", "job-bench.yaml"):
        assert DOCUMENTS[name][0]["spec"]["backoffLimit"] == 0


# ---- values


@pytest.mark.parametrize("version", kinds.VERSIONS)
@pytest.mark.parametrize("name", VALUES)
def test_values_render_into_what_kubernetes_takes(name: str, version: str):
    documents = render(f"../examples/{name}")
    assert [problem for document in documents for problem in kinds.problems(document, version)] == []
    assert all(d["metadata"]["labels"]["app.kubernetes.io/instance"] == "demo" for d in documents)


def test_kueue_queues_the_whole_cluster():
    (cluster,) = of_kind(render("../examples/kueue.yaml"), "RayCluster")
    assert cluster["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "inference"
    annotations = pod_templates([cluster])["worker"]["metadata"]["annotations"]
    assert "kueue.x-k8s.io/podset-preferred-topology" in annotations


def test_volcano_waits_for_head_and_workers_together():
    documents = render("../examples/volcano.yaml", f"fullnameOverride={RELEASE}")
    (gang,) = of_kind(documents, "PodGroup")
    sets = {d["metadata"]["name"]: d["spec"]["replicas"] for d in of_kind(documents, "StatefulSet")}
    assert gang["spec"]["minMember"] == sum(sets.values()) == 5
    for component in ("head", "worker"):
        template = pod_templates(documents)[component]
        assert template["spec"]["schedulerName"] == "volcano"
        assert template["metadata"]["annotations"]["scheduling.k8s.io/group-name"] == gang["metadata"]["name"]


@pytest.mark.parametrize("settings", [(), ("router.service.port=80",)])
def test_the_routes_lead_to_the_router_and_the_gateway_may_pass(settings: tuple[str, ...]):
    documents = render("../examples/gateway-api.yaml", *settings)
    service = named(documents, "Service", "")
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    for kind, port in (("HTTPRoute", "http"), ("GRPCRoute", "grpc")):
        (route,) = of_kind(documents, kind)
        (rule,) = route["spec"]["rules"]
        assert rule["backendRefs"] == [{"name": FULLNAME, "port": ports[port]}]
    router = Peer(pod_templates(documents)["router"]["metadata"]["labels"], NAMESPACE)
    policies = list(of_kind(documents, "NetworkPolicy"))
    for port in (8000, 50053):
        assert allowed(policies, Peer({}, "gateways"), router, port)
        assert not allowed(policies, Peer({}, "elsewhere"), router, port)


def test_rdma_devices_and_their_right_are_the_workers_alone():
    templates = pod_templates(render("../examples/rdma.yaml"))
    for component, template in templates.items():
        for container in template["spec"]["containers"]:
            is_worker = component == "worker"
            assert ("rdma/ib" in container["resources"]["limits"]) == is_worker
            assert ("add" in container["securityContext"]["capabilities"]) == is_worker
    (network,) = of_kind(render("../examples/rdma.yaml"), "NetworkAttachmentDefinition")
    assert json.loads(network["spec"]["config"])["type"] == "ib-sriov"


# ---- the working directory of `ray job submit --working-dir .`


def test_the_checkout_is_far_below_what_ray_takes(tmp_path: Path):
    """Zipped as Ray does it: without what .gitignore names, and without .git and the environment."""
    package = tmp_path / "checkout.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    assert GCS_STORAGE_MAX_SIZE >= 500 * 2**20
    assert package.stat().st_size < GCS_STORAGE_MAX_SIZE / 20
