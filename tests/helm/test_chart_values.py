"""The values: each is commented, checked by a schema that is closed at every level, and used."""

import json
import re
from collections.abc import Iterator

import yaml

from tests.helm.render import CHART

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
TEXT = (CHART / "values.yaml").read_text()
VALUES = yaml.safe_load(TEXT)
TEMPLATES = "\n".join(
    path.read_text() for path in sorted((CHART / "templates").rglob("*")) if path.suffix in (".yaml", ".tpl", ".txt")
)
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


def test_every_value_is_used_by_a_template():
    """By its name after its parent's, as in .Values.tls.certManager and then .duration."""
    unused = []
    for path, _ in leaves(VALUES, SCHEMA):
        *_, parent, name = ("Values", *path)
        if parent in COMPONENTS:
            parent = "values" if name in SHARED else parent
        here = rf"\.{parent}\b[\s\S]*\.{name}\b"
        # Some small objects are handed on whole.
        whole = rf"(toJson|toYaml|deepCopy) \$?[.\w]*\.{parent}\b"
        if name != "global" and not re.search(here, TEMPLATES) and not re.search(whole, TEMPLATES):
            unused.append(".".join(path))
    assert unused == []


def test_the_defaults_of_components_agree_in_what_they_share():
    assert len(SHARED) > 10
    for name in SHARED - {"resources"}:
        assert len({json.dumps(VALUES[component][name]) for component in COMPONENTS}) == 1, name
