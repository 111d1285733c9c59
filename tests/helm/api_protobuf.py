"""The little of Kubernetes' protobuf encoding that Helm sends: its release Secrets and its delete options."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

MAGIC = b"k8s\0"


def decode(body: bytes) -> dict[str, Any]:
    """A Secret or DeleteOptions as JSON would have it. Raises ValueError for anything else."""
    unknown = _fields(body.removeprefix(MAGIC))
    about = _fields(unknown[1][0])
    kind = about[2][0].decode()
    raw = _fields(unknown[2][0])
    match kind:
        case "Secret":
            return {
                "apiVersion": "v1",
                "kind": kind,
                "metadata": _metadata(_fields(raw[1][0])),
                "data": {key: base64.b64encode(value).decode() for key, value in _entries(raw.get(2, []))},
                "type": raw.get(3, [b"Opaque"])[0].decode(),
            }
        case "DeleteOptions":
            policy = raw.get(4, [b""])[0].decode()
            return {"kind": kind, **({"propagationPolicy": policy} if policy else {})}
    raise ValueError(f"{kind} comes as protobuf; add it here")


def _metadata(fields: dict[int, list[Any]]) -> dict[str, Any]:
    names = {1: "name", 2: "generateName", 3: "namespace", 5: "uid", 6: "resourceVersion"}
    found: dict[str, Any] = {name: fields[number][0].decode() for number, name in names.items() if number in fields}
    for number, name in ((11, "labels"), (12, "annotations")):
        if number in fields:
            found[name] = {key: value.decode() for key, value in _entries(fields[number])}
    return {name: value for name, value in found.items() if value}


def _entries(items: list[bytes]) -> Iterator[tuple[str, bytes]]:
    for item in items:
        fields = _fields(item)
        yield fields[1][0].decode(), fields.get(2, [b""])[0]


def _fields(message: bytes) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        value, at = _varint(message, at)
        match tag & 7:
            case 0:
                found.setdefault(tag >> 3, []).append(value)
            case 2:
                found.setdefault(tag >> 3, []).append(message[at : at + value])
                at += value
            case other:
                raise ValueError(f"wire type {other}")
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
