"""index.json of a packed folder: what it is of, and whether its files are whole. Torch-free.

It is written when a conversion begins, so that another one can go on with it, and with the files' sizes and checksums
when all of them are there.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from experts.packed.layout import PAGE, Part

VERSION = 1  # of the layout, the formats' bytes and what encodes them
INDEX = "index.json"
SAMPLES = 64  # pages of each file whose bytes the checksum covers


def begin(folder: Path, part: Part) -> bool:
    """Mark the folder as begun. Returns whether it was already, with the same layout, so that its files count."""
    identity = _identity(part)
    if _read(folder).get("identity") == identity:
        return True
    _write(folder, {"identity": identity})
    return False


def finish(folder: Path, part: Part) -> None:
    """Mark the folder as complete."""
    files = {file: _fingerprint(folder / file) for file in part.sizes}
    _write(folder, {"identity": _identity(part), "files": files})


def problem(folder: Path, part: Part) -> str | None:
    """Why the folder is not a complete packed `part`; None if it is."""
    value = _read(folder)
    identity = value.get("identity")
    if not isinstance(identity, dict):
        return f"its {INDEX} is missing or damaged"
    for key, wanted in _identity(part).items():
        if identity.get(key) != wanted:
            return f"it is of another {key}"
    files = value.get("files")
    if not isinstance(files, dict):
        return "it is not complete"
    for file, size in part.sizes.items():
        path = folder / file
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            return f"{file} has {found} bytes, expected {size}"
        if files.get(file) != _fingerprint(path):
            return f"{file} is damaged"
    return None


def _identity(part: Part) -> dict[str, Any]:
    """The folder's name tells the model. layout: a digest of where every tensor lies."""
    places = [[i.name, i.dtype, list(i.shape), i.file.name, i.offset, i.nbytes] for i in part.tensors.values()]
    layout = hashlib.blake2b(json.dumps(places).encode(), digest_size=16).hexdigest()
    return {"version": VERSION, "model": part.folder.parent.name, "layout": layout}


def _fingerprint(path: Path) -> str:
    """blake2b of the first page, the last one and some between."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        pages = os.fstat(stream.fileno()).st_size // PAGE
        for page in sorted({index * max(0, pages - 1) // (SAMPLES - 1) for index in range(SAMPLES)}):
            digest.update(os.pread(stream.fileno(), PAGE, page * PAGE))
    return digest.hexdigest()


def _read(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(folder: Path, value: dict[str, Any]) -> None:
    partial = folder / f".{INDEX}"
    partial.write_text(json.dumps(value))
    partial.replace(folder / INDEX)
