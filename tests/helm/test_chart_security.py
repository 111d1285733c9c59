"""The rendered pods keep to the restricted Pod Security Standard, and hold no right and no token without a use."""

import base64
import json
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.helm import tools
from tests.helm.render import CI_FILES, FULLNAME, NAMESPACE, containers, named, of_kind, pod_templates, render

TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"
# What a pod may mount by the restricted standard.
FREE_VOLUMES = {"configMap", "downwardAPI", "emptyDir", "persistentVolumeClaim", "projected", "secret", "image"}
ROLES_BY_FILE = {
    "cpu.yaml": {"router", "deployer"},
    "cache-image.yaml": {"router", "deployer"},
    "kuberay.yaml": {"router", "deployer"},
    "gpu.yaml": {"router", "deployer", "ray"},
    "secure.yaml": set(),
    "external.yaml": set(),
}
WAIVED = tomllib.loads((Path(__file__).parent / "checkov_waived.toml").read_text())


@pytest.mark.parametrize("file", CI_FILES)
def test_every_pod_keeps_to_the_restricted_standard(file):
    for name, template in pod_templates(render(file)).items():
        spec = template["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        kinds = {kind for volume in spec.get("volumes", []) for kind in volume.keys() - {"name"}}
        assert kinds - FREE_VOLUMES == ({"hostPath"} if file == "gpu.yaml" and name in ("head", "worker") else set())
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(template):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert not context.get("privileged")
            assert all("hostPort" not in port for port in container.get("ports", []))


def test_capabilities_are_added_to_worker_containers_only_and_only_when_asked():
    for name, template in pod_templates(render("gpu.yaml", 'workers.capabilities=["IPC_LOCK"]')).items():
        for container in containers(template):
            added = container["securityContext"]["capabilities"].get("add", [])
            assert added == (["IPC_LOCK"] if name == "worker" else []), (name, container["name"])


@pytest.mark.parametrize("file", CI_FILES)
def test_a_token_is_mounted_only_into_containers_that_call_the_kubernetes_api(file):
    """A router that watches EndpointSlices, a deployer that reports, and the first container that reads a node."""
    for name, template in pod_templates(render(file)).items():
        assert template["spec"]["automountServiceAccountToken"] is False
        users = set()
        for container in containers(template):
            words = " ".join([*container["command"], *container.get("args", [])])
            if "--engines=kubernetes:" in words or "--kubernetes=" in words or "node-labels --output" in words:
                users.add(container["name"])
        mounted = {
            container["name"]
            for container in containers(template)
            for mount in container.get("volumeMounts", [])
            if mount["mountPath"] == TOKEN
        }
        assert mounted == users, name
        projected = any("projected" in volume for volume in template["spec"].get("volumes", []))
        assert projected == bool(users), name


@pytest.mark.parametrize("file", CI_FILES)
def test_roles_are_given_to_those_that_use_them(file):
    documents = render(file)
    bound = {
        subject["name"].removeprefix(f"{FULLNAME}-")
        for binding in of_kind(documents, "RoleBinding", "ClusterRoleBinding")
        for subject in binding["subjects"]
    }
    assert bound == ROLES_BY_FILE[file]
    accounts = {account["metadata"]["name"] for account in of_kind(documents, "ServiceAccount")}
    assert all(account["automountServiceAccountToken"] is False for account in of_kind(documents, "ServiceAccount"))
    assert {t["spec"].get("serviceAccountName", "default") for t in pod_templates(documents).values()} - accounts <= {
        "default"
    }


def rights(file: str, component: str, *settings: str) -> dict[str, set[str]]:
    """Verbs by resource, with the names that they are limited to."""
    rules = named(render(file, *settings), "Role", component)["rules"]
    return {
        "/".join([*rule["apiGroups"], *rule["resources"], *rule.get("resourceNames", [])]).lstrip("/"): set(
            rule["verbs"]
        )
        for rule in rules
    }


def test_rights_are_the_least_that_do():
    slices = {"discovery.k8s.io/endpointslices": {"list", "watch"}}
    assert rights("cpu.yaml", "router") == slices
    reports = slices | {"pods": {"list"}, "events.k8s.io/events": {"create"}}
    gates = {"pods/status": {"patch"}}
    assert rights("cpu.yaml", "deployer", "kubernetes.readinessGates=false") == reports
    assert rights("cpu.yaml", "deployer") == reports | gates
    scale = {f"apps/statefulsets/scale/{FULLNAME}-worker": {"get", "patch"}}
    assert rights("cpu.yaml", "deployer", "workers.autoscaling.enabled=true") == reports | gates | scale
    cluster = {f"ray.io/rayclusters/{FULLNAME}": {"get", "patch"}}
    assert rights("kuberay.yaml", "deployer") == reports | gates | cluster
    (nodes,) = of_kind(render("gpu.yaml"), "ClusterRole")
    assert nodes["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]}]
    assert nodes["metadata"]["name"].startswith(f"{NAMESPACE}-")


def test_roles_can_be_left_to_somebody_else():
    kinds = {document["kind"] for document in render("gpu.yaml", "rbac.create=false")}
    assert not kinds & {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}


@pytest.mark.parametrize("file", CI_FILES)
def test_no_service_sets_variables_in_our_pods(file):
    """A Service named barista would set BARISTA_PORT, which the program takes for its setting."""
    for name, template in pod_templates(render(file)).items():
        assert template["spec"]["enableServiceLinks"] is False, name


@pytest.mark.parametrize("file", CI_FILES)
def test_secrets_appear_by_name_only(file):
    """No value of a Secret in an argument, a variable or a ConfigMap."""
    documents = render(file)
    values = {value for secret in of_kind(documents, "Secret") for value in secret["data"].values()}
    rest = json.dumps([document for document in documents if document["kind"] != "Secret"])
    assert not [value for value in values if value in rest]


def test_a_generated_certificate_lasts_as_long_as_asked_for():
    pair = named(render("cpu.yaml", "tls.generatedDays=10"), "Secret", "tls")["data"]
    for name in ("ca.crt", "tls.crt"):
        certificate = base64.b64decode(pair[name])
        for days, ends in ((9, 0), (11, 1)):
            command = ["openssl", "x509", "-noout", "-checkend", str(days * 86400)]
            assert subprocess.run(command, input=certificate, capture_output=True).returncode == ends


def test_the_hub_token_is_given_to_the_pulling_container_alone():
    for name, template in pod_templates(render("gpu.yaml")).items():
        holders = {c["name"] for c in containers(template) if "hub-token" in json.dumps(c)}
        assert holders == (set() if name in ("deployer", "test") else {"model"})


@pytest.mark.long
def test_checkov_finds_nothing_that_is_not_waived(tmp_path):
    for file in CI_FILES:
        (tmp_path / file).write_text(yaml.safe_dump_all(render(file)))
    command = [tools.checkov(), "--directory", tmp_path, "--framework", "kubernetes", "--skip-download", "--compact"]
    done = subprocess.run([*command, "--output", "json"], capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 100, done.stderr
    found = {
        (check["check_id"], check["resource"].replace(f".{NAMESPACE}.", "-"))
        for check in report["results"]["failed_checks"]
    }
    waived = {(place, check) for place, reasons in WAIVED.items() for check in reasons}
    used = {
        (place, check) for check, resource in found for place in ("everywhere", resource) if (place, check) in waived
    }
    assert {
        f"{check} {resource}" for check, resource in found if not {("everywhere", check), (resource, check)} & used
    } == set()
    assert waived - used == set(), "no longer found: take it off the list"
    assert all(len(reason) > 20 for reasons in WAIVED.values() for reason in reasons.values())
