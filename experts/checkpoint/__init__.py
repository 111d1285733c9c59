"""Reading what a model's files say about themselves: configuration and tensor table. No torch, no weights."""

from __future__ import annotations

from experts.checkpoint.builtin import find_builtin_gguf
from experts.checkpoint.open import open_checkpoint
from experts.checkpoint.types import Checkpoint, TensorInfo

__all__ = ["Checkpoint", "TensorInfo", "find_builtin_gguf", "open_checkpoint"]
