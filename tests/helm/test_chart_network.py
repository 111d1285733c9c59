"""The rendered NetworkPolicies allow the flows that exist, and no other."""

from itertools import product

import pytest

from tests.helm.flows import Peer, allowed, lets_through
from tests.helm.render import NAMESPACE, Document, of_kind, pod_templates, render

HTTP, GRPC, ENGINE, CONTROLLER, GCS, DASHBOARD, METRICS, API, HTTPS, MINIKUBE, MICROK8S, ANY = (
    8000,
    50053,
    50051,
    50052,
    6379,
    8265,
    8080,
    6443,
    443,
    8443,
    16443,
    40123,
)
PORTS = (
    HTTP,
    GRPC,
    ENGINE,
    CONTROLLER,
    GCS,
    DASHBOARD,
    METRICS,
    API,
    HTTPS,
    MINIKUBE,
    MICROK8S,
    ANY,
    22,
    4318,
    8090,
    52365,
)

ELSEWHERE = {
    "stranger": Peer({"app": "stranger"}, "other"),
    "neighbour": Peer({"app": "neighbour"}, NAMESPACE),
    "ray-client": Peer({"barista.dev/ray-client": "true"}, NAMESPACE),
    "prometheus": Peer({"app.kubernetes.io/name": "prometheus"}, "monitoring"),
    "other release": Peer(
        {"app.kubernetes.io/name": "barista", "app.kubernetes.io/instance": "other", "barista.dev/ray": "node"},
        NAMESPACE,
    ),
    "internet": Peer(address="93.184.216.34"),
    "credentials of the cloud": Peer(address="169.254.169.254"),
    "outer ray": Peer({"ray.io/cluster": "ray"}, "ray"),
    "ingress": Peer({"app": "ingress"}, "ingress-nginx"),
}


def peers(documents: list[Document]) -> dict[str, Peer]:
    """Our pods with their rendered labels, and others."""
    templates = pod_templates(documents)
    test = {"app.kubernetes.io/name": "barista", "app.kubernetes.io/instance": "demo"}
    ours = {name: Peer(template["metadata"]["labels"], NAMESPACE) for name, template in templates.items()}
    ours.setdefault("test", Peer(test | {"app.kubernetes.io/component": "test"}, NAMESPACE))
    return ours | ELSEWHERE


def flows(documents: list[Document]) -> set[tuple[str, str, int]]:
    """Every (from, to, port) that is let through and touches the release."""
    policies = list(of_kind(documents, "NetworkPolicy"))
    ends = peers(documents)
    pairs = [(a, b) for a, b in product(ends, ends) if a not in ELSEWHERE or b not in ELSEWHERE]
    return {(a, b, p) for (a, b), p in product(pairs, PORTS) if allowed(policies, ends[a], ends[b], p)}


def between(sources, targets, ports) -> set[tuple[str, str, int]]:
    return set(product(sources, targets, ports))


RAY = ("head", "worker")
PODS = tuple(name for name, peer in ELSEWHERE.items() if peer.namespace)
# The address of the Kubernetes API is not known: on its ports everything can be reached that lets itself be.
API_PORTS = (HTTPS, API, MINIKUBE, MICROK8S)
TO_API = between(("router", "deployer"), ELSEWHERE, API_PORTS)
INSIDE = (
    between(RAY, RAY, PORTS)
    | between(("router",), RAY, (ENGINE, CONTROLLER))
    | between(("deployer",), RAY, (CONTROLLER,))
    | between(("deployer", "ray-client"), ("head",), (DASHBOARD,))
)
CLIENTS = between(PODS, ("router",), (HTTP, GRPC)) | {("test", "router", HTTP)}


def test_a_static_release_has_the_flows_that_exist_and_no_other():
    assert flows(render("cpu.yaml")) == INSIDE | TO_API | CLIENTS


def test_a_hub_model_monitoring_and_autoscaling_add_a_flow_each():
    hub = between((*RAY, "router"), ("internet",), (HTTPS,))
    scraped = between(("prometheus",), RAY, (METRICS,))
    asked = between(("deployer",), RAY, (ENGINE,))  # how many requests wait
    assert flows(render("kuberay.yaml")) == INSIDE | TO_API | CLIENTS | hub | scraped | asked


def test_without_grpc_its_port_is_closed():
    found = flows(render("cpu.yaml", "router.grpc.enabled=false"))
    assert found == {flow for flow in INSIDE | TO_API | CLIENTS if flow[1] != "router" or flow[2] != GRPC}


def test_an_external_cluster_is_reached_by_router_and_deployer_only():
    remover = between(("remover",), ("outer ray",), (DASHBOARD,))
    outward = between(("router",), ("outer ray",), (ENGINE, CONTROLLER, DASHBOARD)) | between(
        ("deployer",), ("outer ray",), (CONTROLLER, DASHBOARD)
    )
    assert flows(render("external.yaml")) == outward | remover | CLIENTS


def test_without_the_kubernetes_api_only_the_ingress_comes_in_and_only_traces_go_out():
    traces = between(("router",), ELSEWHERE, (4318,))
    clients = between(("ingress",), ("router",), (HTTP, GRPC)) | {("test", "router", HTTP)}
    assert flows(render("secure.yaml")) == INSIDE | traces | clients


def test_reading_node_labels_takes_the_kubernetes_api():
    found = flows(render("cpu.yaml", "kubernetes.nodeLabels=true"))
    assert between(RAY, ELSEWHERE, API_PORTS) <= found
    assert not between(RAY, ELSEWHERE, (ANY,)) & found


@pytest.mark.parametrize("file", ["cpu.yaml", "kuberay.yaml"])
def test_both_ends_of_a_flow_inside_name_it_and_neither_names_more(file):
    documents = render(file)
    policies = list(of_kind(documents, "NetworkPolicy"))
    ours = {name: peer for name, peer in peers(documents).items() if name not in ELSEWHERE}
    # Clients come from everywhere, and the Kubernetes API may be anywhere.
    ports = set(PORTS) - {HTTP, GRPC, *API_PORTS}
    for (a, source), (b, target), port in product(ours.items(), ours.items(), ports):
        out = lets_through(policies, source, target, "egress", port)
        assert out == lets_through(policies, target, source, "ingress", port), (a, b, port)


@pytest.mark.parametrize("file", ["cpu.yaml", "external.yaml"])
def test_every_pod_may_resolve_names_and_only_at_the_cluster_dns(file):
    documents = render(file)
    policies = list(of_kind(documents, "NetworkPolicy"))
    dns = Peer({"k8s-app": "kube-dns"}, "kube-system")
    on_the_node = Peer(address="169.254.20.10")
    for name, end in peers(documents).items():
        if name not in ELSEWHERE:
            assert allowed(policies, end, dns, 53, "UDP"), name
            assert allowed(policies, end, dns, 53), name
            assert allowed(policies, end, on_the_node, 53, "UDP"), name
            assert not allowed(policies, end, ELSEWHERE["internet"], 53, "UDP"), name
            assert not allowed(policies, end, dns, 80), name


def test_the_servers_of_another_dns_are_reached_where_they_listen():
    there = "networkPolicy.dnsTo[0].namespaceSelector.matchLabels.kubernetes\\.io/metadata\\.name=openshift-dns"
    for setting, peer in ((there, Peer({}, "openshift-dns")), ("networkPolicy.dnsTo=[]", ELSEWHERE["internet"])):
        documents = render("cpu.yaml", setting)
        policies = list(of_kind(documents, "NetworkPolicy"))
        assert allowed(policies, peers(documents)["head"], peer, 5353, "UDP")


def test_the_kubernetes_api_is_reached_on_its_ports_alone():
    found = flows(render("cpu.yaml", "networkPolicy.apiServerPorts=[22]"))
    assert {port for source, target, port in found if target in ELSEWHERE} == {22}


def test_a_pull_goes_everywhere_but_to_the_credentials_of_the_cloud():
    documents = render("kuberay.yaml", "kubernetes.enabled=false", "workers.autoscaling.enabled=false")
    policies = list(of_kind(documents, "NetworkPolicy"))
    head = peers(documents)["head"]
    assert allowed(policies, head, ELSEWHERE["internet"], HTTPS)
    assert allowed(policies, head, Peer(address="2606:2800:220:1::1"), HTTPS)
    assert not allowed(policies, head, ELSEWHERE["credentials of the cloud"], HTTPS)
    assert not allowed(policies, head, Peer(address="fe80::1"), HTTPS)


def test_without_clients_only_the_test_comes_in():
    found = flows(render("kuberay.yaml", "networkPolicy.clientsFrom=[]", "networkPolicy.prometheusFrom=[]"))
    assert {flow for flow in found if flow[1] == "router"} == {("test", "router", HTTP)}
    assert not {flow for flow in found if flow[0] == "prometheus"}


def test_switched_off_there_are_none():
    assert not list(of_kind(render("cpu.yaml", "networkPolicy.enabled=false"), "NetworkPolicy"))
