"""Downloading a model from the Hugging Face hub: only the files that Barista reads, resumable, each one verified."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from barista.cache import new_directory
from barista.errors import BaristaError, CheckpointError
from router.model.families import model_spec
from router.models import pulled_path

# The base of all errors of the hub's HTTP library, which is not the same in all of its versions.
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
# Weights, configuration and tokenizer; no code and no pickles.
WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "LICENSE*")


def pull(name: str) -> Path:
    """Bring the hub's model `name` into the cache and return its folder; at once if it is there.

    An interrupted download goes on where it stopped. The architecture is checked before any weight is downloaded.
    Raises BaristaError: no such model, no access, no connection, a damaged file, an unknown architecture, no space.
    """
    final = pulled_path(name)
    if final.exists():
        return final
    try:
        return _download(name, final)
    except GatedRepoError as error:
        raise BaristaError(f"{name} is gated.", "Accept its terms on the hub, then run: hf auth login") from error
    except RepositoryNotFoundError as error:
        raise BaristaError(
            f"The hub has no model {name}, or it is private.", "Check the name, or run: hf auth login"
        ) from error
    except (TRANSPORT_ERROR, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise BaristaError(f"Cannot download {name}: {error}.", "Run it again to go on where it stopped.") from error


def _download(name: str, final: Path) -> Path:
    info = HfApi().model_info(name, files_metadata=True)
    wanted = [file for file in info.siblings or [] if any(Path(file.rfilename).match(glob) for glob in WANTED)]
    if not any(file.rfilename.endswith(".safetensors") for file in wanted):
        raise BaristaError(f"{name} has no safetensors files.", "Choose a repository that has them.")
    with new_directory(final, sum(file.size or 0 for file in wanted), resume=True) as folder:
        if folder is not None:
            config = hf_hub_download(name, "config.json", revision=info.sha, local_dir=folder)
            model_spec(json.loads(Path(config).read_text(encoding="utf-8")))
            names = [file.rfilename for file in wanted]
            snapshot_download(name, revision=info.sha, local_dir=folder, allow_patterns=names)
            for file in wanted:
                _verify(folder / file.rfilename, file)
            shutil.rmtree(folder / ".cache", ignore_errors=True)
    return final


def _verify(path: Path, file: Any) -> None:
    """Compare a file with what the hub says of it: sha256 for large files, git's blob id for the others."""
    with path.open("rb") as stream:
        if file.lfs is not None:
            expected, found = file.lfs.sha256, hashlib.file_digest(stream, "sha256").hexdigest()
        else:
            content = stream.read()
            expected, found = file.blob_id, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if found != expected:
        path.unlink()
        raise CheckpointError(f"{path.name} arrived damaged and was removed.", "Run it again to download it anew.")
