"""Reading what a model's files say about themselves: configuration and tensor table. No torch, no weights."""

from __future__ import annotations

from experts.checkpoint.digest import checkpoint_digest
from experts.checkpoint.open import open_checkpoint
from experts.checkpoint.types import Checkpoint, TensorInfo

__all__ = ["Checkpoint", "TensorInfo", "checkpoint_digest", "open_checkpoint"]
