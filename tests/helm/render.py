"""What the chart renders to, by a real Helm. Each rendering is made once for a process."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.helm import tools

CHART = Path(__file__).parents[2] / "helm/barista"
CI_FILES = tuple(sorted(path.name for path in (CHART / "ci").glob("*.yaml")))
HELMS = tuple(tools.HELMS)
RELEASE, NAMESPACE = "demo", "prod"
FULLNAME = "demo-barista"

# What a cluster with every operator that the chart can use says that it knows.
APIS = ("ray.io/v1/RayCluster", "cert-manager.io/v1", "keda.sh/v1alpha1", "monitoring.coreos.com/v1")

Document = dict[str, Any]
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Refused(Exception):
    """Helm has not rendered the chart. Its text is what Helm wrote."""


def render(file: str | None, *settings: str, helm: str = HELMS[-1], apis: tuple[str, ...] = APIS) -> list[Document]:
    """The documents of a values file of ci/ (None: the chart's own values), in Helm's order. settings: as of --set,
    or a flag of Helm's.

    apis: what the cluster knows besides Kubernetes. Raises Refused.
    """
    return [*yaml.load_all(render_text(file, *settings, helm=helm, apis=apis), _Loader)]


def refusal(file: str | None, *settings: str, apis: tuple[str, ...] = APIS) -> str:
    """What Helm says in place of rendering. AssertionError if it renders."""
    try:
        render(file, *settings, apis=apis)
    except Refused as refused:
        return " ".join(str(refused).split())
    raise AssertionError(f"{file} renders with {', '.join(settings)}")


@cache
def render_text(file: str | None, *settings: str, helm: str = HELMS[-1], apis: tuple[str, ...] = APIS) -> str:
    """The same as Helm writes it."""
    command: list[str | Path] = [tools.helm(helm), "template", RELEASE, CHART, "--namespace", NAMESPACE]
    if file is not None:
        command += ["--values", CHART / "ci" / file]
    command += [f"--api-versions={api}" for api in apis]
    for setting in settings:
        is_json = setting.partition("=")[2][:1] in ("{", "[", '"')
        command += [setting] if setting.startswith("--") else ["--set-json" if is_json else "--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(done.stderr)
    return done.stdout


def of_kind(documents: Iterable[Document], *kinds: str) -> Iterator[Document]:
    """The documents of these kinds."""
    return (document for document in documents if document["kind"] in kinds)


def named(documents: Iterable[Document], kind: str, component: str) -> Document:
    """The one document of this kind that is named <fullname>-<component>, or <fullname> for ""."""
    name = f"{FULLNAME}-{component}".rstrip("-")
    (found,) = (d for d in of_kind(documents, kind) if d["metadata"]["name"] == name)
    return found


def pod_templates(documents: Iterable[Document]) -> dict[str, Document]:
    """Every pod that the documents ask for, by its component label: a PodTemplateSpec, or the pod itself."""
    templates = []
    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] in ("StatefulSet", "Deployment", "Job"):
            templates.append(spec["template"])
        elif document["kind"] == "RayCluster":
            templates += [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
        elif document["kind"] == "Pod":
            templates.append(document)
    return {template["metadata"]["labels"]["app.kubernetes.io/component"]: template for template in templates}


def containers(template: Document) -> list[Document]:
    """All containers of a pod, the first ones first."""
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def flags(container: Document) -> dict[str, str]:
    """The arguments of the form --name=value."""
    pairs = (argument.partition("=") for argument in container["args"] if argument.startswith("--"))
    return {name: value for name, _, value in pairs}
