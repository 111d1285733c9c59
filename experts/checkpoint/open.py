"""The door: a path in, a Checkpoint out."""

from __future__ import annotations

from pathlib import Path

from barista.errors import CheckpointError
from experts.checkpoint.gguf_model import open_gguf, shard_paths
from experts.checkpoint.safetensors_dir import open_safetensors_dir
from experts.checkpoint.types import Checkpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """Describe the model at `path` from its headers; no weight is read.

    path: a directory with config.json and .safetensors files, a .gguf file (any shard of a split one), or a directory
    with exactly one GGUF model. Raises CheckpointError naming the file, the tensor if there is one, and a remedy.
    """
    gguf = find_gguf(path)
    return open_safetensors_dir(path) if gguf is None else open_gguf(gguf)


def find_gguf(path: Path) -> Path | None:
    """The .gguf file (the first shard of a split model) that `path` stands for, None for a safetensors directory.

    Raises CheckpointError when there is no model at `path`, or more than one.
    """
    remedy = "Give a .gguf file, or a directory with config.json and .safetensors files or with one GGUF model."
    if path.is_file() and path.suffix == ".gguf":
        return shard_paths(path)[0]
    if not path.is_dir():
        raise CheckpointError(f"{path}: {'not a model' if path.exists() else 'no such file or directory'}.", remedy)
    if (path / "config.json").is_file():
        return None
    models = sorted({shard_paths(file)[0] for file in path.glob("*.gguf")})
    if len(models) != 1:
        names = ", ".join(model.name for model in models[:3])
        raise CheckpointError(
            f"{path}: {f'{len(models)} GGUF models ({names})' if models else 'no model'} here.", remedy
        )
    return models[0]
