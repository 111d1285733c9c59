"""Both Helms lint and render every values file of ci/, alike, into documents that Kubernetes takes."""

import json
import subprocess

import pytest

from tests.helm import kinds, tools
from tests.helm.render import CHART, CI_FILES, HELMS, Document, of_kind, pod_templates, render

# Image volumes came with Kubernetes 1.31.
NEEDS_NEWER = {"cache-image.yaml": "1.31"}


def lint(helm: str, file: str) -> subprocess.CompletedProcess[str]:
    command = [tools.helm(helm), "lint", "--strict", CHART, "--values", CHART / "ci" / file]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def without_secrets(documents: list[Document]) -> str:
    """As text, without what is new in every rendering."""
    return json.dumps([{**d, "data": sorted(d["data"])} if d["kind"] == "Secret" else d for d in documents])


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize("file", CI_FILES)
def test_lints_strictly(helm, file):
    done = lint(helm, file)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", CI_FILES)
def test_both_helms_render_the_same(file):
    older, newer = (render(file, helm=helm) for helm in HELMS)
    assert without_secrets(older) == without_secrets(newer)


@pytest.mark.parametrize("version", kinds.VERSIONS)
@pytest.mark.parametrize("file", CI_FILES)
def test_every_document_is_what_its_kind_takes(file, version):
    if version < NEEDS_NEWER.get(file, version):
        version = NEEDS_NEWER[file]
    assert [problem for document in render(file) for problem in kinds.problems(document, version)] == []


def test_a_document_with_a_typing_error_is_not():
    (cluster,) = of_kind(render("kuberay.yaml"), "RayCluster")
    cluster["spec"]["workerGroupSpecs"][0]["minReplica"] = 1
    pod_templates([cluster])["head"]["spec"]["containers"][0]["comand"] = ["ray"]
    told = "\n".join(kinds.problems(cluster, "1.37"))
    assert "minReplica" in told
    assert "comand" in told


def test_every_object_is_named_and_labelled_for_its_release():
    for file in CI_FILES:
        documents = render(file)
        names = [(d["kind"], d["metadata"]["name"]) for d in documents]
        assert len(set(names)) == len(names)
        for document in documents:
            assert document["metadata"]["labels"]["app.kubernetes.io/instance"] == "demo", document["metadata"]["name"]


def test_the_chart_brings_nothing_for_the_whole_cluster_unless_asked():
    """Whoever owns a namespace can install it."""
    whole = {"ClusterRole", "ClusterRoleBinding", "PriorityClass"}
    for file in CI_FILES:
        found = {document["kind"] for document in render(file)} & whole
        assert found == (whole if file == "gpu.yaml" else set()), file


def test_extra_objects_are_rendered_as_templates():
    (priority,) = of_kind(render("gpu.yaml"), "PriorityClass")
    assert priority["metadata"]["labels"] == {"app.kubernetes.io/instance": "demo"}


def test_a_long_release_name_leaves_room_for_what_kubernetes_adds():
    """A label of a StatefulSet's pods is its name and eleven more characters; a RayCluster's name has 53 at most."""
    documents = render("kuberay.yaml", f"fullnameOverride={'a' * 63}")
    (cluster,) = of_kind(documents, "RayCluster")
    assert len(cluster["metadata"]["name"]) == 45
    assert max(len(d["metadata"]["name"]) for d in documents) <= 63
