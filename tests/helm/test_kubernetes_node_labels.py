"""A node's labels become its Ray node's, and never keep a pod from starting."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray._private.label_utils import parse_node_labels_from_yaml_file
from typer.testing import CliRunner

from experts.cluster.workers import DOMAIN_LABELS
from router.kubernetes.node_labels import RAY_NAMES, ray_labels, read_node_labels

GPU_NODE = {
    "kubernetes.io/hostname": "node-7",
    "kubernetes.io/os": "linux",
    "node.kubernetes.io/instance-type": "p5.48xlarge",
    "topology.kubernetes.io/region": "eu-central-1",
    "topology.kubernetes.io/zone": "eu-central-1a",
    "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3",
    "nvidia.com/gpu.count": "8",
    "nvidia.com/gpu.memory": "81559",
    "nvidia.com/gpu.clique": "7b1f3f9e-0d2b-4c67-9f6a-3a2f0d7f1c11.0",
}


def a_node(name="node-7", labels=GPU_NODE):
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": dict(labels)}}


def written(path, node="node-7"):
    """What `barista node-labels` writes, as Ray reads it."""
    import typer

    from router.commands import node_labels

    app = typer.Typer()
    app.command()(node_labels.command)
    result = CliRunner().invoke(app, ["--output", str(path)], env={"NODE_NAME": node})
    assert result.exit_code == 0, result.output
    return parse_node_labels_from_yaml_file(str(path))


def test_gpus_zone_and_machine_and_rays_own_names_for_them():
    found = ray_labels(GPU_NODE)
    assert found == {name: value for name, value in GPU_NODE.items() if name != "kubernetes.io/os"} | {
        "ray.io/availability-zone": "eu-central-1a",
        "ray.io/region": "eu-central-1",
        "ray.io/gpu-domain": GPU_NODE["nvidia.com/gpu.clique"],
    }
    assert all(found[name] == "eu-central-1a" for name in DOMAIN_LABELS)


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(sorted(RAY_NAMES)), st.text(max_size=70)))
def test_ray_takes_whatever_comes_of_it(labels):
    from ray._private.label_utils import validate_node_label_syntax

    found = ray_labels(labels)
    validate_node_label_syntax(found)
    assert "" not in found.values()


def test_the_file_is_one_that_ray_reads(api, tmp_path):
    api.put(a_node())
    assert written(tmp_path / "labels.yaml") == ray_labels(GPU_NODE)


def test_a_node_without_labels_gives_an_empty_mapping(api, tmp_path, caplog):
    api.put(a_node(labels={}))
    assert written(tmp_path / "labels.yaml") == {}
    assert "topology.kubernetes.io/zone" in caplog.text


def test_a_denied_request_names_the_cluster_role_and_the_pod_starts(api, tmp_path, caplog):
    api.put(a_node())
    api.deny(lambda request: request.resource == "nodes")
    assert written(tmp_path / "labels.yaml") == {}
    assert "ClusterRole" in caplog.text


@pytest.mark.parametrize("trouble", ["no such node", "server error", "no server"])
def test_no_trouble_keeps_the_pod_from_starting(api, tmp_path, caplog, trouble):
    if trouble == "server error":
        api.fail_next(500)
    elif trouble == "no server":
        api.stop()
    assert asyncio.run(read_node_labels("node-7")) == {}
    assert "node-7" in caplog.text
    if trouble == "no server":
        api.start()


def test_outside_kubernetes_it_says_so_and_goes_on(monkeypatch, tmp_path, caplog):
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert asyncio.run(read_node_labels("node-7")) == {}
    assert "KUBECONFIG" in caplog.text
