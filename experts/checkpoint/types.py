"""What a checkpoint is to everyone else: a configuration and a table of where each tensor's bytes lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOWNLOAD_AGAIN = "Download it again with: barista pull NAME"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies. Nothing of it is read yet.

    name: the canonical Hugging Face name.
    dtype: a safetensors dtype ("BF16", "F8_E4M3", ...) or a ggml block type ("Q4_1", "Q6_K", ...).
    shape: values, slowest dimension first. offset, nbytes: bytes within `file`; the tensor is contiguous there.
    interleaved_heads: 0, or the number of heads whose rows llama.cpp's converter wrote as (0, half, 1, half + 1, ...)
    in each head, so that a reader can put them back into Hugging Face's order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    interleaved_heads: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model's files, described from their headers alone.

    path: the directory or .gguf file it was opened by. config: as in Hugging Face's config.json, `architectures`
    included. tensors: canonical name -> place. files: every file that holds tensors.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...] = field(default=())
