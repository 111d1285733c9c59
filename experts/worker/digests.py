"""The digests of experts' weights, remembered from start to start so that loading need not read every byte again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from barista.cache import cache_root
from experts.checkpoint import Checkpoint
from experts.kernels import Weight, parts_of

log = logging.getLogger(__name__)

DIGEST_BYTES = 16


def digest_of(weights: Iterable[Weight]) -> bytes:
    """blake2b, 16 bytes, of the weights' bytes one after the other. hashlib gives up the GIL while it reads."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for weight in weights:
        for part in parts_of(weight):
            digest.update(part.view(torch.uint8).numpy().data)
    return digest.digest()


class DigestManifest:
    """(layer, expert) -> digest, kept in the cache folder for one checkpoint as it lies on this disk.

    The entries are those of files of the same paths, sizes and times of change; others are not believed. Several
    workers may share the file: each merges what it has computed, and what a race loses is computed again another day.
    """

    def __init__(self, checkpoint: Checkpoint, model_digest: bytes, root: Path | None = None) -> None:
        self._file = (root or cache_root()) / "digests" / f"{model_digest.hex()}.json"
        self._identity = _identity(checkpoint)
        self._digests = self._load()
        self._unsaved = False

    def get(self, layer: int, expert: int) -> bytes | None:
        """The digest, if it is known."""
        return self._digests.get((layer, expert))

    def put(self, layer: int, expert: int, digest: bytes) -> None:
        """Remember a digest; `save` writes it down."""
        self._digests[layer, expert] = digest
        self._unsaved = True

    def save(self) -> None:
        """Write the file as one step, if there is anything new. A cache that cannot be written is no error."""
        if not self._unsaved:
            return
        self._digests = self._load() | self._digests
        value = {
            "files": self._identity,
            "digests": {f"{layer}/{expert}": digest.hex() for (layer, expert), digest in self._digests.items()},
        }
        try:
            _write(self._file, json.dumps(value))
        except OSError as error:
            log.info("expert digests are not kept: %s: %s", self._file, error.strerror)
        self._unsaved = False

    def _load(self) -> dict[tuple[int, int], bytes]:
        """What the file says; nothing if it is missing, damaged, or about other files."""
        try:
            value = json.loads(self._file.read_text())
            if value["files"] != self._identity:
                return {}
            digests = {_key(name): bytes.fromhex(digest) for name, digest in value["digests"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return {key: digest for key, digest in digests.items() if len(digest) == DIGEST_BYTES}


def _identity(checkpoint: Checkpoint) -> list[list[str | int]]:
    files = sorted({info.file for info in checkpoint.tensors.values()})
    return [[str(file.absolute()), (status := file.stat()).st_size, status.st_mtime_ns] for file in files]


def _key(name: str) -> tuple[int, int]:
    layer, expert = name.split("/")
    return int(layer), int(expert)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
        Path(partial).replace(file)
    except OSError:
        Path(partial).unlink(missing_ok=True)
        raise
