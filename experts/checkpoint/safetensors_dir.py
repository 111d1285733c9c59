"""A Hugging Face model directory: config.json and one or more .safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from barista.errors import CheckpointError
from experts.checkpoint.fused_experts import unfuse
from experts.checkpoint.safetensors_header import read_safetensors_header
from experts.checkpoint.types import DOWNLOAD_AGAIN, Checkpoint, TensorInfo

INDEX_NAME = "model.safetensors.index.json"


def open_safetensors_dir(path: Path) -> Checkpoint:
    """The checkpoint in this directory. Raises CheckpointError naming the file that is missing or wrong."""
    config = read_json_object(path / "config.json")
    index = path / INDEX_NAME
    tensors = _sharded(path, index) if index.is_file() else _single(path)
    files = tuple(sorted({info.file for info in tensors.values()}))
    return Checkpoint(path=path, config=config, tensors=unfuse(tensors), files=files)


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises CheckpointError if it is missing or holds anything else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}.", DOWNLOAD_AGAIN) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({str(error)[:120]}).", DOWNLOAD_AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: must hold a JSON object.", DOWNLOAD_AGAIN)
    return value


def _single(path: Path) -> dict[str, TensorInfo]:
    usual = path / "model.safetensors"  # beside it some hubs keep the same weights under the vendor's own names
    files = [usual] if usual.is_file() else sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        found = f"{len(files)} .safetensors files and no {INDEX_NAME}" if files else "no .safetensors file"
        raise CheckpointError(f"{path}: has {found}.", DOWNLOAD_AGAIN)
    return read_safetensors_header(files[0])


def _sharded(path: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: needs a weight_map of tensor names to file names.", DOWNLOAD_AGAIN)
    for tensor, shard in weight_map.items():
        # An index comes with the download: it must not point outside its own directory.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: tensor {tensor}: {shard!r} is not a plain file name.", DOWNLOAD_AGAIN)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if not (path / shard).is_file():
            raise CheckpointError(f"{index}: names {shard}, which is missing.", DOWNLOAD_AGAIN)
        stored = read_safetensors_header(path / shard)
        tensors |= {name: info for name, info in stored.items() if weight_map.get(name, shard) == shard}
    if lost := [name for name in weight_map if name not in tensors]:
        raise CheckpointError(
            f"{index}: tensor {lost[0]} is not in {weight_map[lost[0]]} ({len(lost)} such).", DOWNLOAD_AGAIN
        )
    return tensors
