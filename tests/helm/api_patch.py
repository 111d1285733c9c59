"""The four ways to change an object over the Kubernetes API, on plain JSON values, and who owns which field of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

Json = Any
Path = tuple[str, ...]
Owners = dict[str, set[Path]]  # by field manager

# How the built-in types merge their lists; every other list is replaced whole.
MERGE_KEYS = {
    "containers": ("name",),
    "initContainers": ("name",),
    "env": ("name",),
    "volumes": ("name",),
    "imagePullSecrets": ("name",),
    "volumeMounts": ("mountPath",),
    "ports": ("containerPort", "port"),
    "conditions": ("type",),
    "ownerReferences": ("uid",),
    "topologySpreadConstraints": ("topologyKey",),
}
NOT_OWNED = ("apiVersion", "kind", "metadata.name", "metadata.namespace", "metadata.uid", "metadata.resourceVersion")


class PatchError(Exception):
    """The patch cannot be applied: 422 to the client."""


class ApplyConflict(Exception):
    """Another manager owns a field that would change: 409 to the client."""


def merge_patch(value: Json, patch: Json) -> Json:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(value) if isinstance(value, dict) else {}
    for key, item in patch.items():
        if item is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), item)
    return merged


def json_patch(value: Json, operations: list[dict[str, Json]]) -> Json:
    """RFC 6902 with test, add, replace and remove. Raises PatchError for a failed test or a missing place."""
    document = {"": copy.deepcopy(value)}
    for operation in operations:
        *parents, last = ["", *(_unescape(part) for part in operation["path"].split("/")[1:])]
        try:
            place: Json = document
            for part in parents:
                place = place[int(part)] if isinstance(place, list) else place[part]
            _do(place, last, operation)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise PatchError(f"{operation['op']} {operation['path']}: {error!r}") from error
    return document[""]


def strategic_patch(value: Json, patch: Json, field: str = "") -> Json:
    """Kubernetes' own: lists of known fields merge by their key; `$patch`, `$retainKeys` and null delete."""
    if isinstance(patch, list):
        return _merge_lists(value, patch, field)
    if not isinstance(patch, dict):
        return patch
    if patch.get("$patch") == "replace":
        return {key: item for key, item in patch.items() if key != "$patch"}
    merged = dict(value) if isinstance(value, dict) else {}
    if "$retainKeys" in patch:
        merged = {key: item for key, item in merged.items() if key in patch["$retainKeys"]}
    for key, item in patch.items():
        if key.startswith("$deleteFromPrimitiveList/"):
            name = key.partition("/")[2]
            merged[name] = [old for old in merged.get(name, []) if old not in item]
        elif key.startswith("$"):
            continue
        elif item is None or (isinstance(item, dict) and item.get("$patch") == "delete"):
            merged.pop(key, None)
        else:
            merged[key] = strategic_patch(merged.get(key), item, key)
    return merged


def apply_patch(value: Json, wanted: Json, owners: Owners, manager: str, *, force: bool, built_in: bool) -> Json:
    """Server-side apply; `owners` is brought up to date. Raises ApplyConflict."""
    before, wish = dict(leaves(value, built_in)), dict(leaves(wanted, built_in))
    others = {name: paths for name, paths in owners.items() if name != manager}
    for name, paths in others.items():
        taken = sorted(path for path in paths & wish.keys() if before.get(path) != wish[path])
        if taken and not force:
            raise ApplyConflict(f'conflict with "{name}": .{".".join(taken[0])}')
        paths.difference_update(taken)
    dropped = owners.get(manager, set()) - wish.keys() - set().union(*others.values())
    owners[manager] = set(wish)
    merged = _without(value, dropped, (), built_in)
    return strategic_patch(merged, wanted) if built_in else merge_patch(merged, wanted)


def take_ownership(before: Json, after: Json, owners: Owners, manager: str, *, built_in: bool) -> None:
    """After an update other than by apply: its manager owns what it has changed, and nobody else does."""
    old, new = dict(leaves(before, built_in)), dict(leaves(after, built_in))
    changed = {path for path, item in new.items() if path not in old or old[path] != item}
    for paths in owners.values():
        paths -= changed | (old.keys() - new.keys())
    owners.setdefault(manager, set()).update(changed)


def leaves(value: Json, built_in: bool, path: Path = ()) -> Iterator[tuple[Path, Json]]:
    """Every value that is owned as a whole, with its path; a merged list's items are named by their key."""
    key = merge_key(value, path[-1] if path else "") if built_in else None
    if ".".join(path) in NOT_OWNED or path[:1] == ("status",):
        return
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from leaves(item, built_in, (*path, name))
    elif key is not None:
        for item in value:
            yield from leaves(item, built_in, (*path, str(item[key])))
    else:
        yield path, value


def merge_key(items: Json, field: str) -> str | None:
    """The key by which this list merges, or None where it is replaced whole."""
    if not isinstance(items, list) or not items:
        return None
    return next((key for key in MERGE_KEYS.get(field, ()) if all(key in item for item in items)), None)


def _merge_lists(value: Json, patch: list[Json], field: str) -> Json:
    key = merge_key(patch, field)
    if key is None:
        return [item for item in patch if not (isinstance(item, dict) and "$patch" in item)]
    if any(item.get("$patch") == "replace" for item in patch):
        return [item for item in patch if "$patch" not in item]
    merged = {item.get(key): item for item in value or []}
    for item in patch:
        if item.get("$patch") == "delete":
            merged.pop(item[key], None)
        else:
            merged[item[key]] = strategic_patch(merged.get(item[key]), item)
    return list(merged.values())


def _without(value: Json, dropped: set[Path], path: Path, built_in: bool) -> Json:
    """The value without these leaves, and without what is empty for their lack."""
    if isinstance(value, dict) and value:
        kept = {name: _without(item, dropped, (*path, name), built_in) for name, item in value.items()}
        return {name: item for name, item in kept.items() if item is not None}
    key = merge_key(value, path[-1] if path else "") if built_in else None
    if key is not None:
        items = [_without(item, dropped, (*path, str(item[key])), built_in) for item in value]
        return [item for item in items if key in (item or {})]
    return None if path in dropped else value


def _do(place: Json, last: str, operation: dict[str, Json]) -> None:
    match operation["op"], place:
        case "test", list():
            _require(place[int(last)] == operation["value"], operation)
        case "test", _:
            _require(last in place and place[last] == operation["value"], operation)
        case "add", list():
            place.insert(len(place) if last == "-" else int(last), operation["value"])
        case "add", _:
            place[last] = operation["value"]
        case "replace", list():
            place[int(last)] = operation["value"]
        case "replace", _:
            _require(last in place, operation)
            place[last] = operation["value"]
        case "remove", list():
            del place[int(last)]
        case "remove", _:
            del place[last]
        case other, _:
            raise PatchError(f"unknown operation {other}")


def _require(holds: bool, operation: dict[str, Json]) -> None:
    if not holds:
        raise PatchError(f"{operation['op']} {operation['path']} failed")


def _unescape(part: str) -> str:
    return part.replace("~1", "/").replace("~0", "~")
