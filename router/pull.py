"""Downloading a model from the Hugging Face hub: only the files that Barista reads, resumable, each one verified.

Beside a model's files lies what the hub said of them, so that a pulled model can be checked without a connection.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import msgspec
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from barista.cache import new_directory, require_space
from barista.errors import BaristaError, CheckpointError
from experts.checkpoint.safetensors_dir import read_json_object
from router.model.families import model_spec
from router.models import pulled_path

# The base of all errors of the hub's HTTP library, which is not the same in all of its versions.
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
# Weights, configuration and tokenizer; no code and no pickles.
WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "LICENSE*")
MANIFEST = ".pulled.json"


class HubFile(msgspec.Struct, frozen=True):
    """One file as the hub describes it. size in bytes. sha256: None for small files, where git's blob_id is used."""

    name: str
    size: int
    sha256: str | None
    blob_id: str

    def matches(self, path: Path) -> bool:
        """True if the file at `path` is this one. Reads all of it unless its size tells."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if self.sha256 is None:
            content = path.read_bytes()
            return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == self.blob_id
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == self.sha256


class Manifest(msgspec.Struct, frozen=True):
    """What one revision (a commit) of a model consists of. tokenizer_only: all but its weights."""

    revision: str
    files: tuple[HubFile, ...]
    tokenizer_only: bool = False


def pull(name: str, *, tokenizer_only: bool = False) -> Path:
    """Bring the hub's model `name` into the cache and return its folder. What is there already is verified.

    tokenizer_only: without the weights, for an API whose engines run elsewhere; a whole model stays whole.

    An interrupted download goes on where it stopped; of a damaged model only what differs is downloaded again. A whole
    one needs no connection. The architecture is checked before any weight is downloaded. Raises BaristaError: no such
    model, no access, no connection, a damaged file, an unknown architecture, no space.
    """
    try:
        return _pull(name, pulled_path(name), tokenizer_only)
    except GatedRepoError as error:
        raise BaristaError(f"{name} is gated.", "Accept its terms on the hub, then run: hf auth login") from error
    except RepositoryNotFoundError as error:
        raise BaristaError(
            f"The hub has no model {name}, or it is private.", "Check the name, or run: hf auth login"
        ) from error
    except (TRANSPORT_ERROR, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise BaristaError(
            f"Cannot download {name}: {error}.", "Run it again with a connection, to go on where it stopped."
        ) from error


def _pull(name: str, final: Path, tokenizer_only: bool) -> Path:
    known = _read_manifest(final)
    if known is not None and known.tokenizer_only and not tokenizer_only:
        known = None  # there is more to it
    if known is not None and not _differing(final, known):
        return final
    manifest = known or _ask_hub(name, tokenizer_only)
    with new_directory(final, sum(file.size for file in manifest.files), resume=True) as folder:
        if folder is None:
            _repair(name, final, manifest)
        else:
            _download(name, folder, manifest)
    return final


def _ask_hub(name: str, tokenizer_only: bool) -> Manifest:
    """What the hub's newest revision holds of WANTED."""
    info = HfApi().model_info(name, files_metadata=True)
    files = tuple(
        HubFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None, file.blob_id or "")
        for file in info.siblings or []
        if any(Path(file.rfilename).match(glob) for glob in WANTED)
    )
    if not any(file.name.endswith(".safetensors") for file in files):
        raise BaristaError(f"{name} has no safetensors files.", "Choose a repository that has them.")
    if tokenizer_only:
        files = tuple(file for file in files if not file.name.endswith(".safetensors"))
    return Manifest(info.sha or "main", files, tokenizer_only)


def _download(name: str, folder: Path, manifest: Manifest) -> None:
    """Fill `folder`. The configuration comes first, since it may name an architecture that cannot be served."""
    config = hf_hub_download(name, "config.json", revision=manifest.revision, local_dir=folder)
    model_spec(read_json_object(Path(config)))
    names = [file.name for file in manifest.files]
    snapshot_download(name, revision=manifest.revision, local_dir=folder, allow_patterns=names)
    for file in manifest.files:
        _require_match(file, folder)
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    _write_manifest(folder, manifest)


def _repair(name: str, final: Path, manifest: Manifest) -> None:
    """Download what differs to a folder beside `final`, then put each file in its place, whole."""
    differing = _differing(final, manifest)
    require_space(final, sum(file.size for file in differing))
    scratch = final.with_name(f".{final.name}.repair")
    for file in differing:
        hf_hub_download(name, file.name, revision=manifest.revision, local_dir=scratch)
        _require_match(file, scratch)
        (final / file.name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / file.name).replace(final / file.name)
    shutil.rmtree(scratch, ignore_errors=True)
    _write_manifest(final, manifest)


def _differing(folder: Path, manifest: Manifest) -> list[HubFile]:
    return [file for file in manifest.files if not file.matches(folder / file.name)]


def _require_match(file: HubFile, folder: Path) -> None:
    path = folder / file.name
    if not file.matches(path):
        path.unlink(missing_ok=True)
        raise CheckpointError(f"{file.name} arrived damaged and was removed.", "Run it again to download it anew.")


def _read_manifest(folder: Path) -> Manifest | None:
    """What `folder` was pulled from, or None if that is not known (any more)."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError):
        return None


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
