"""Whether a document is what its kind takes: Kubernetes' own schemas, and small ones of ours for operators' kinds."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
from jsonschema.validators import Draft202012Validator
from referencing import Registry, Resource

VERSIONS = ("1.30", "1.37")
_OURS = Path(__file__).parent / "schemas"
_THEIRS = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"


def problems(document: dict[str, Any], version: str) -> list[str]:
    """What is wrong with a document, strictly, in Kubernetes `version`; "" and unknown keys included."""
    name = f"{document['kind']}.{document['apiVersion']} {document.get('metadata', {}).get('name')}"
    validator = _validator(document["apiVersion"], document["kind"], version)
    if validator is None:
        return [f"{name}: Kubernetes {version} has no such kind"]
    return [f"{name}: {error.json_path}: {error.message}" for error in validator.iter_errors(document)]


@cache
def _validator(api_version: str, kind: str, version: str) -> Draft202012Validator | None:
    group, _, rest = api_version.rpartition("/")
    files = [_OURS / f"{kind.lower()}.json"]
    if "." not in group or group.endswith(".k8s.io"):  # else it is an operator's, and a name may be Kubernetes' too
        prefix = f"{group.partition('.')[0]}-" if group else ""
        files.insert(0, _THEIRS / f"v{version}.0-local-strict" / f"{kind.lower()}-{prefix}{rest}.json")
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return None
    return Draft202012Validator(json.loads(file.read_text()), registry=_definitions(version))


@cache
def _definitions(version: str) -> Registry[Any]:
    """What the schemas of one Kubernetes version refer to; large, and so read once."""
    file = _THEIRS / f"v{version}.0-local-strict/_definitions.json"
    resource: Resource[Any] = Resource.from_contents(json.loads(file.read_text()))
    return resource @ Registry()
