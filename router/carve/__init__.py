"""Carving: a dense SwiGLU model becomes a real Mixture-of-Experts one, without training.

Each layer's FFN is split into shared neurons, which always run, and routed experts, of which a fitted gate picks each
token's top k. The result is an ordinary Glm4MoeForCausalLM checkpoint; with every expert chosen it is the dense model.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from barista.cache import require_space
from barista.errors import CacheError, CheckpointError, ConfigError
from experts.checkpoint import Checkpoint, open_checkpoint
from experts.checkpoint.names import check_names
from router.carve.calibrate import calibrate, calibration_tokens
from router.carve.layout import CarveOptions, Layout
from router.carve.recipe import Recipe
from router.carve.writer import GENERATION_CONFIG, carved_tensors, stored_dtype, write_config, write_tensors
from router.model.families import model_spec
from router.model.spec import DenseFFNSpec, GQASpec, ModelSpec
from router.model.tensors import count_parameters, ignored_tensors, trunk_tensors
from router.tokenizer import Tokenizer

__all__ = ["CarveOptions", "CarveReport", "Layout", "carve", "carve_house_blend"]

ARCHITECTURE = "Glm4MoeForCausalLM"
ELSEWHERE = "Free some space, or choose a directory for OUT on another disk that you may write."
HOUSE_BLEND = "recipes/house-blend.safetensors"
OnProgress = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True)
class CarveReport:
    """What was made. lost_energy: the share of the FFNs' energy that calibration tokens did not get, from 0 to 1."""

    layout: Layout
    num_layers: int
    num_tokens: int
    lost_energy: float
    nbytes: int


def carve(source: Path, out: Path, *, options: CarveOptions, progress: OnProgress) -> CarveReport:
    """Carve the dense Llama-, Qwen2- or Qwen3-shaped model at `source` into the new directory `out`.

    source: a directory with safetensors, or a GGUF file. progress(fraction from 0 to 1, what is being done). `out`
    appears whole or not at all. Raises ConfigError (an option, or `out` exists and may not be replaced),
    CheckpointError (the source cannot be read or carved), CacheError (no space, or `out` cannot be written).
    """
    _check_out(source, out, options)
    checkpoint = open_checkpoint(source)
    spec = _dense_spec(checkpoint)
    layout = Layout.of(options, spec.layers[0].intermediate_size)  # type: ignore[union-attr]
    tokenizer = Tokenizer.from_checkpoint(source)
    token_ids = calibration_tokens(tokenizer, options)
    _require_writable(out, count_parameters(spec)[0] * stored_dtype(checkpoint).itemsize)
    recipe, lost = calibrate(checkpoint, spec, layout, token_ids, lambda f, message: progress(0.9 * f, message))
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        nbytes = write_carved(checkpoint, spec, recipe, tokenizer, folder, lambda f, m: progress(0.9 + 0.1 * f, m))
        if out.exists():
            out.rename(Path(scratch) / "replaced")
        folder.rename(out)
    return CarveReport(
        layout=layout, num_layers=spec.num_layers, num_tokens=token_ids.numel(), lost_energy=lost, nbytes=nbytes
    )


def _check_out(source: Path, out: Path, options: CarveOptions) -> None:
    """Raise ConfigError unless `out` does not exist, or is an earlier carving that --force may replace."""
    if Path(os.path.realpath(source)).is_relative_to(os.path.realpath(out)):
        raise ConfigError(f"{out} holds the source, {source}.", "Choose another directory for OUT.")
    if not os.path.lexists(out):
        return
    if not options.force:
        raise ConfigError(f"{out} exists already.", "Choose another directory, or replace it with --force.")
    if not _is_carving(out):
        raise ConfigError(
            f"{out} is no carved model, so --force does not replace it.", "Choose another directory, or remove it."
        )


def _is_carving(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("architectures") == [ARCHITECTURE]


def _require_writable(out: Path, needed: int) -> None:
    """Make the folder that `out` goes to. Raises CacheError unless it can be written and has `needed` bytes."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent).cleanup()
        require_space(out.parent, needed)
    except OSError as error:
        raise CacheError(f"cannot write {out.parent}: {error.strerror}.", ELSEWHERE) from error
    except CacheError as error:
        raise CacheError(error.message, ELSEWHERE) from error


def carve_house_blend(source: Path, folder: Path, progress: OnProgress) -> None:
    """Fill the empty `folder` with the built-in model, by the recipe in this package: a few seconds.

    source: the GGUF file of SmolLM2-135M-Instruct that the recipe was computed from.
    """
    checkpoint = open_checkpoint(source)
    with importlib.resources.as_file(importlib.resources.files(__name__) / HOUSE_BLEND) as file:
        recipe = Recipe.load(file)
    write_carved(checkpoint, _dense_spec(checkpoint), recipe, Tokenizer.from_checkpoint(source), folder, progress)


def write_carved(
    checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe, tokenizer: Tokenizer, folder: Path, progress: OnProgress
) -> int:
    """Write the whole carved model into `folder`. Returns the bytes of its weights."""
    progress(0.0, "tokenizer")
    tokenizer.save(folder)
    generation = checkpoint.path / GENERATION_CONFIG
    if generation.is_file():
        shutil.copyfile(generation, folder / GENERATION_CONFIG)
    write_config(folder, checkpoint, spec, recipe.layout)
    progress(0.1, "weights")
    nbytes = write_tensors(folder, carved_tensors(checkpoint, spec, recipe))
    progress(1.0, "done")
    return nbytes


def _dense_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The spec of a source. Raises CheckpointError unless it is one that Glm4Moe can express."""
    spec = model_spec(checkpoint.config)
    remedy = "barista carve takes dense Llama-, Qwen2- and Qwen3-shaped models."
    if not all(isinstance(layer, DenseFFNSpec) for layer in spec.layers):
        raise CheckpointError(f"{checkpoint.path}: {spec.family} is not a dense model.", remedy)
    attention = spec.attention
    if not isinstance(attention, GQASpec) or attention.out_bias or attention.qk_norm == "full":
        raise CheckpointError(f"{checkpoint.path}: this model's attention has no place in Glm4Moe.", remedy)
    check_names(trunk_tensors(spec), checkpoint, ignored_tensors(spec))
    return spec
