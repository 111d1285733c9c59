"""The values: each is commented, checked by a schema that is closed at every level, and used."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any

import yaml
from jsonschema.validators import Draft7Validator

from tests.helm.render import CHART, Refused, render_text

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
TEXT = (CHART / "values.yaml").read_text()
VALUES = yaml.safe_load(TEXT)
# Free by nature: Kubernetes' own objects, and what charts share by Helm's convention.
OPEN = {"#/definitions/kubernetesObject", "#/properties/global", "#/properties/extraObjects/items"}
COMPONENTS = {"head", "workers", "deployer", "router"}
SHARED = set.intersection(*(set(VALUES[name]) for name in COMPONENTS))


def objects(schema: dict, where: str = "#") -> Iterator[tuple[str, dict]]:
    """Every schema of an object, with its place."""
    types = schema.get("type", [])
    if "object" in ([types] if isinstance(types, str) else types):
        yield where, schema
    for key, child in schema.items():
        if key in ("properties", "definitions"):
            for name, sub in child.items():
                yield from objects(sub, f"{where}/{key}/{name}")
        elif isinstance(child, dict):
            yield from objects(child, f"{where}/{key}")


def resolved(schema: dict) -> dict:
    while "$ref" in schema:
        schema = SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]]
    return schema


def leaves(values: dict, schema: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Every value that the schema lists one by one, with its schema."""
    for name, sub in schema["properties"].items():
        sub = resolved(sub)
        assert name in values, f"{'.'.join([*path, name])} is in the schema, but not in values.yaml"
        if "properties" in sub and values[name]:
            yield from leaves(values[name], sub, (*path, name))
        else:
            yield (*path, name), sub


def test_the_schema_is_closed_at_every_level():
    """A map of names that only the user knows says of what type its values are."""
    for where, schema in objects(SCHEMA):
        if where in OPEN:
            continue
        rest = schema.get("additionalProperties")
        assert rest is False or (isinstance(rest, dict) and "$ref" in rest and "properties" not in schema), where


def test_every_reference_of_the_schema_is_defined_and_every_definition_referred_to():
    used = set(re.findall(r'"#/definitions/(\w+)"', json.dumps(SCHEMA)))
    assert used == SCHEMA["definitions"].keys()


def test_every_value_is_in_the_schema_and_the_other_way_round():
    def check(values: dict, schema: dict, path: str) -> None:
        properties = schema["properties"]
        assert not values.keys() - properties.keys(), path
        for name, value in values.items():
            sub = resolved(properties[name])
            if "properties" in sub and isinstance(value, dict):
                check(value, sub, f"{path}.{name}")

    check(VALUES, SCHEMA, "values")
    assert len(list(leaves(VALUES, SCHEMA))) > 150


def test_every_value_has_a_comment_of_one_line():
    lines = [line for line in TEXT.splitlines() if re.match(r" *[\w-]+:", line)]
    assert [line for line in lines if not line.partition("  # ")[2].endswith(".") or len(line) > 120] == []


# Every value that can hold a mark is rendered with one, in three setups: each shows values that another one hides.
SETUPS: tuple[dict[str, Any], ...] = (
    {
        "ray.mode": "static",
        "modelCache.type": "pvc",
        "modelCache.pvc.existingClaim": "",
        "image.digest": "",
        "tls.mode": "cert-manager",
        "router.autoscaling.type": "keda",
        "router.ingress.enabled": True,
        "kubernetes.nodeLabels": True,
        "monitoring.serviceMonitor.enabled": True,
        "monitoring.podMonitor.enabled": True,
        "monitoring.rules.enabled": True,
        "monitoring.dashboard.enabled": True,
    },
    {
        "ray.mode": "kuberay",
        "modelCache.type": "image",
        "model.name": "/models/blend",
        "tls.mode": "secret",
        "workers.autoscaling.enabled": True,
        "router.autoscaling.type": "external",
    },
    {"ray.mode": "external", "modelCache.type": "pvc", "tls.mode": "secret"},
)
# In all of them: what must fit something else.
FITTING: dict[str, Any] = {
    "engine.replicas": 1,
    "workers.gpus": 0,
    "workers.groupSize": 1,
    "modelCache.image.mountPath": "/models",
    "extraObjects": [],
}

# The other values, each with what has to be set for it to matter.
NOTHING_MADE = ("auth.existingSecret=keys", "tls.mode=secret", "tls.secretName=pair")
CACHE_IMAGE = (
    "modelCache.type=image",
    "modelCache.image.reference=r",
    "modelCache.image.mountPath=/xx",
    "model.name=/xx/y/z",
)
GPUS = ("device=cuda", "workers.gpus=1")
SWITCHES: dict[str, tuple[str, ...]] = {
    "image.pullPolicy=Always": (),
    "device=cuda": (),
    "model.format=int8": (),
    "model.pull=never": ("modelCache.type=pvc",),
    'model.inspect={"held_bytes": 1, "top_k": 100}': GPUS,
    "modelCache.type=pvc": (),
    'modelCache.pvc.accessModes=["ReadWriteOnce"]': ("modelCache.type=pvc",),
    "modelCache.hostPath.path=/y": ("modelCache.type=hostPath", "modelCache.hostPath.path=/x"),
    "modelCache.image.pullPolicy=Always": CACHE_IMAGE,
    "modelCache.image.mountPath=/xx/y": CACHE_IMAGE,
    "ray.mode=kuberay": (),
    "head.startupSeconds=50": (),
    "workers.gpus=2": GPUS,
    "workers.gpuResource=amd.com/gpu": GPUS,
    "workers.jobPlaces=3": (),
    "workers.memoryPercent=1": ('model.inspect={"held_bytes": 2000000000}',),
    "workers.groupSize=2": ("workers.autoscaling.enabled=true", "workers.autoscaling.minReplicas=2"),
    "workers.autoscaling.enabled=true": (),
    "workers.startupSeconds=50": (),
    "engine.replicas=2": GPUS,
    "router.startupSeconds=50": (),
    "router.grpc.enabled=false": (),
    "router.service.type=NodePort": (),
    "router.ingress.enabled=true": (),
    "router.autoscaling.type=pods": (),
    "tls.mode=cert-manager": (),
    "tls.certManager.issuerKind=ClusterIssuer": ("tls.mode=cert-manager", "tls.certManager.issuerName=mine"),
    "kubernetes.enabled=false": (),
    "kubernetes.readinessGates=false": (),
    "kubernetes.nodeLabels=true": (),
    "rbac.create=false": (),
    "networkPolicy.enabled=false": (),
    "monitoring.serviceMonitor.enabled=true": (),
    "monitoring.serviceMonitor.scheme=https": ("monitoring.serviceMonitor.enabled=true",),
    "monitoring.podMonitor.enabled=true": (),
    "monitoring.rules.enabled=true": (),
    "monitoring.dashboard.enabled=true": (),
    'extraObjects=[{"apiVersion": "v1", "kind": "ConfigMap"}]': (),
}
# Nothing reads the first; test_chart_security.py looks at the second, in a certificate.
UNSEEN = {"global", "tls.generatedDays"}


def candidates(number: int) -> Iterator[Any]:
    """Values of every type that hold the number."""
    text = f"v{number}"
    texts = {text: text}
    yield from (number, text, f"/{text}", f"http://{text}:{number}", f"{number}h", f"1.1.{number}", f"{text}.com/x")
    yield from (f"sha256:{number:064}", 10**8 + number, texts, {text: number}, [text], [number], [texts])
    yield from ([{"name": text}], [{"name": text, "mountPath": f"/{text}"}], [{"hosts": [text]}], [{"key": text}])
    yield from ([{"ipBlock": {"cidr": text}}], {"nodeAffinity": texts})


def marks() -> dict[str, tuple[str, Any]]:
    """For each value that can hold a mark: the mark, and the value with it."""
    found = {}
    for index, (path, schema) in enumerate(leaves(VALUES, SCHEMA)):
        number = 40007 + 100 * index  # so far apart that a sum with something small is nobody's
        validator = Draft7Validator(schema | {"definitions": SCHEMA["definitions"]})
        value = next((value for value in candidates(number) if validator.is_valid(value)), None)
        if value is not None:
            found[".".join(path)] = (str(number), value)
    return found


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    root: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        reduce(lambda here, key: here.setdefault(key, {}), parents, root)[name] = value
    return root


def changes(setting: str, context: tuple[str, ...]) -> bool:
    """Whether Helm renders something else with a setting, or refuses it."""
    before = render_text(None, *NOTHING_MADE, *context)
    try:
        return render_text(None, *NOTHING_MADE, *context, setting) != before
    except Refused:
        return True


def test_every_value_changes_what_is_rendered(tmp_path):
    marked = marks()
    flat = {path: value for path, (_, value) in marked.items()}
    files = []
    for number, setup in enumerate(SETUPS):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(nested(flat | FITTING | setup)))
    with ThreadPoolExecutor(2) as executor:
        texts = executor.map(lambda file: render_text(None, f"--values={file}"), files)
        effective = executor.map(changes, SWITCHES, SWITCHES.values())
        shown = "".join(texts)
        changing = {setting.partition("=")[0] for setting, effect in zip(SWITCHES, effective, strict=True) if effect}
    visible = {path for path, (mark, _) in marked.items() if mark in shown}
    assert {".".join(path) for path, _ in leaves(VALUES, SCHEMA)} - visible - changing == UNSEEN
    assert not visible & changing, "seen already: take it off the list"


def test_the_defaults_of_components_agree_in_what_they_share():
    assert len(SHARED) > 10
    for name in SHARED - {"resources"}:
        assert len({json.dumps(VALUES[component][name]) for component in COMPONENTS}) == 1, name
