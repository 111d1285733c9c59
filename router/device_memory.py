"""How a GPU holds a model, how much of its memory that takes, and what is left for the KV cache. Torch-free."""

from __future__ import annotations

import math

from barista.cache import size
from barista.errors import ConfigError
from experts.checkpoint import Checkpoint
from experts.expert_model import expert_groups
from experts.formats import BYTES_PER_VALUE, FP8, PLAIN, Holding, forms_of
from router.model.packed import expert_layers
from router.model.spec import ModelSpec
from router.model.tensors import expert_tensors, trunk_tensors

# Kept free beside weights and cache for what a step works in: gathered keys, logits, CUDA graphs, cuBLAS's workspace.
LEAST_RESERVE = 2**30
RESERVED_SHARE = 10  # a tenth of the device


def on_device(held: Holding) -> Holding:
    """How a device holds a model that memory would hold so: experts may be in FP8, all else is in the rows' dtype."""
    return held if held.format == FP8.name else Holding(held.dtype, PLAIN)


def device_bytes(checkpoint: Checkpoint, spec: ModelSpec, held: Holding, *, with_experts: bool = True) -> int:
    """Bytes of all weights on a device, or of the trunk's alone. held: of on_device."""
    experts = forms_of(checkpoint, expert_groups(expert_layers(spec)), held.format)
    shapes = trunk_tensors(spec) | (expert_tensors(spec) if with_experts else {})
    return sum(
        experts[name].nbytes(shape) if name in experts else math.prod(shape) * BYTES_PER_VALUE[held.dtype]
        for name, shape in shapes.items()
    )


def require_room_on_device(
    checkpoint: Checkpoint, spec: ModelSpec, held: Holding, free: int, *, with_experts: bool = True
) -> None:
    """Raises ConfigError unless the weights fit into `free` bytes of the device."""
    needed = device_bytes(checkpoint, spec, held, with_experts=with_experts)
    if needed > free:
        raise ConfigError(
            f"{checkpoint.path} needs {size(needed)} of a GPU's memory in {held.name}; {size(free)} are free.",
            "Take a smaller model or a larger GPU, or give --device cpu.",
        )


def kv_budget(free: int, total: int, wanted: int) -> int:
    """Bytes of the KV cache that nobody gave a size: as many as may ever be wanted, but never those that steps need.

    free, total: bytes of the device once the weights are there (torch.cuda.mem_get_info).
    """
    return max(0, min(wanted, free - max(LEAST_RESERVE, total // RESERVED_SHARE)))
