"""Computing a recipe: the dense model reads a text, and each layer is carved by what its FFN saw."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from pathlib import Path

import torch

from barista.errors import ConfigError
from experts.checkpoint import Checkpoint
from router.carve.clustering import carve_layer
from router.carve.dense import ffn_inputs, float32_loader
from router.carve.layout import CarveOptions, Layout
from router.carve.recipe import Recipe
from router.model.spec import ModelSpec
from router.tokenizer import Tokenizer

SEQUENCE_LENGTH = 512
CALIBRATION_TEXT = "recipes/calibration.txt"


def calibration_tokens(tokenizer: Tokenizer, options: CarveOptions) -> torch.Tensor:
    """[num_sequences, length] int64: pieces of the text, evenly spread over it, each behind BOS if the model has one.

    Raises ConfigError: the text is unreadable, or shorter than a piece.
    """
    ids = torch.tensor(tokenizer.encode(_read_text(options.text), add_special_tokens=False))
    bos = tokenizer.encode(tokenizer.bos_token, add_special_tokens=False)[:1] if tokenizer.bos_token else []
    piece = SEQUENCE_LENGTH - len(bos)
    wanted = max(1, options.max_tokens // SEQUENCE_LENGTH)
    available = len(ids) // piece
    if available == 0:
        raise ConfigError(f"The calibration text has {len(ids)} tokens.", f"Give --text a file with at least {piece}.")
    pieces = ids[: available * piece].view(available, piece)
    chosen = pieces[torch.linspace(0, available - 1, min(wanted, available)).round().to(torch.int64)]
    return torch.cat([torch.tensor(bos, dtype=torch.int64).expand(len(chosen), -1), chosen], dim=1)


@torch.inference_mode()
def calibrate(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    layout: Layout,
    token_ids: torch.Tensor,
    progress: Callable[[float, str], None],
) -> tuple[Recipe, float]:
    """The recipe for this model, and the share of FFN energy that calibration tokens lose, averaged over layers.

    token_ids: [num_sequences, length] int64. Holds one layer and a few matrices [num_tokens, intermediate] in memory.
    """
    layers, lost = [], 0.0
    for index, (x, ffn) in enumerate(ffn_inputs(float32_loader(checkpoint, spec), spec, token_ids)):
        progress(index / spec.num_layers, f"layer {index + 1} of {spec.num_layers}")
        recipe, layer_lost = carve_layer(x, ffn, layout)
        layers.append(recipe)
        lost += layer_lost / spec.num_layers
    return Recipe(layout, tuple(layers)), lost


def _read_text(path: Path | None) -> str:
    if path is None:
        return (importlib.resources.files("router.carve") / CALIBRATION_TEXT).read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--text {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text {path} is not UTF-8 text.", "Convert it to UTF-8.") from error
