"""The door: a path in, a Checkpoint out."""

from __future__ import annotations

from pathlib import Path

from barista.errors import CheckpointError
from experts.checkpoint.safetensors_dir import open_safetensors_dir
from experts.checkpoint.types import Checkpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """Describe the model at `path` from its headers; no weight is read.

    path: a directory with config.json and .safetensors files, a .gguf file (any shard of a split one), or a directory
    with exactly one GGUF model. Raises CheckpointError naming the file, the tensor if there is one, and a remedy.
    """
    if (path / "config.json").is_file():
        return open_safetensors_dir(path)
    raise CheckpointError(f"{path}: no model here.", "Give a directory with config.json, or a .gguf file.")
