"""A GGUF model, split or not, as a Checkpoint under Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from barista.errors import CheckpointError
from experts.checkpoint.fused_experts import split_experts
from experts.checkpoint.gguf_config import ROPE_FACTORS, config_of, family_of
from experts.checkpoint.gguf_header import GGUFFile, read_gguf_header
from experts.checkpoint.gguf_names import TOP_NAMES, GGUFFamily
from experts.checkpoint.types import DOWNLOAD_AGAIN, Checkpoint, TensorInfo

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def open_gguf(path: Path) -> Checkpoint:
    """The checkpoint in this .gguf file or, for a shard, in all shards beside it."""
    gguf = _join([read_gguf_header(file) for file in shard_paths(path)])
    family = family_of(gguf)
    config = config_of(gguf, family)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, TensorInfo] = {}
    for info in gguf.tensors.values():
        for renamed in _translate(info, family, heads if family.interleaved_qk else {}):
            tensors[renamed.name] = renamed
    files = tuple(sorted({info.file for info in gguf.tensors.values()}))
    return Checkpoint(path=path, config=config, tensors=tensors, files=files)


def shard_paths(path: Path) -> list[Path]:
    """Every file of the model that `path` is a file of, the first shard first."""
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    shards = [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, int(match[3]) + 1)]
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"{path}: its shard {shard.name} is missing.", DOWNLOAD_AGAIN)
    return shards


def _join(shards: list[GGUFFile]) -> GGUFFile:
    """One GGUFFile with the first shard's metadata and the tensors of all."""
    first = shards[0]
    for number, shard in enumerate(shards):
        claimed = (shard.metadata.get("split.no", 0), shard.metadata.get("split.count", 0) or 1)
        if claimed != (number, len(shards)):
            raise CheckpointError(
                f"{shard.path}: says it is shard {claimed[0]} of {claimed[1]}, expected {number} of {len(shards)}.",
                DOWNLOAD_AGAIN,
            )
    tensors = {name: info for shard in shards for name, info in shard.tensors.items()}
    expected = first.metadata.get("split.tensors.count", len(tensors))
    if len(tensors) != expected:
        raise CheckpointError(
            f"{first.path}: {len(tensors)} tensors in all shards, expected {expected}.", DOWNLOAD_AGAIN
        )
    return GGUFFile(first.path, first.metadata, tensors)


def _translate(info: TensorInfo, family: GGUFFamily, interleaved: dict[str, int]) -> Iterator[TensorInfo]:
    """The tensor under its Hugging Face name, or an expert tensor's slices.

    An unknown tensor keeps its own name, so that it is reported as unexpected when the model is built. RoPE divisors
    vanish: they are part of the configuration already.
    """
    match = _LAYER_TENSOR.fullmatch(info.name)
    if info.name == ROPE_FACTORS:
        return
    if match is None or match[2] not in {*family.layer_names, *family.expert_names}:
        yield replace(info, name=TOP_NAMES.get(info.name, info.name))
        return
    layer, stem, suffix = match.groups()
    prefix = f"model.layers.{layer}."
    if stem in family.expert_names:
        yield from split_experts(info, [f"{prefix}{name}.{suffix}" for name in family.expert_names[stem]])
        return
    heads = interleaved.get(stem, 0)
    if heads and info.shape[0] % (2 * heads):
        raise CheckpointError(
            f"{info.file}: tensor {info.name}: {info.shape[0]} rows do not divide into {heads} heads."
        )
    yield replace(info, name=f"{prefix}{family.layer_names[stem]}.{suffix}", interleaved_heads=heads)
