"""Experts larger than memory: what `--expert-memory` asks of a model, and how much is then in memory. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping

from barista.cache import size
from barista.errors import ConfigError
from experts.checkpoint import Checkpoint
from experts.formats import Holding, is_mapped
from router.memory import conversation_bytes, held_bytes
from router.model.packed import expert_layers, model_forms
from router.model.spec import ModelSpec, MoESpec
from router.model.tensors import expert_tensors, trunk_tensors


def resident_bytes(held: Mapping[str, int], spec: ModelSpec, expert_memory: int | None) -> int:
    """Bytes of weights in memory at a time: the trunk, and the experts as far as the limit allows.

    held: bytes by tensor, of router.memory.held_bytes. expert_memory: None for no limit.
    """
    trunk = sum(held[name] for name in trunk_tensors(spec))
    experts = sum(held[name] for name in expert_tensors(spec))
    return trunk + (experts if expert_memory is None else min(experts, expert_memory))


def check_expert_memory(checkpoint: Checkpoint, spec: ModelSpec, held: Holding, limit: int) -> None:
    """Raises ConfigError unless the experts can be kept within `limit` bytes, held so.

    One token's experts of a layer must fit, and they must be in files as they are in memory, to be read at any time.
    CheckpointError: a shape that the format cannot take.
    """
    if not spec.num_experts:
        raise ConfigError(
            f"expert_memory is {limit}, but {checkpoint.path} is a dense model: it has no experts.",
            "Leave --expert-memory out.",
        )
    _require_mapped(checkpoint, spec, held)
    smallest = _smallest(spec, held_bytes(checkpoint, spec, held))
    if limit < smallest:
        raise ConfigError(
            f"expert_memory is {limit} bytes, less than the experts that one token needs in one layer.",
            f"Give at least {smallest} (--expert-memory).",
        )


def require_room_for_experts(checkpoint: Checkpoint, spec: ModelSpec, held: Holding, limit: int, free: int) -> None:
    """Raises ConfigError unless trunk, one conversation and as many experts as the limit allows fit into `free` bytes.

    CheckpointError: a shape that the format cannot take.
    """
    weights = held_bytes(checkpoint, spec, held)
    others = sum(weights[name] for name in trunk_tensors(spec)) + conversation_bytes(spec, held)
    if resident_bytes(weights, spec, limit) + conversation_bytes(spec, held) <= free:
        return
    room, smallest = free - others, _smallest(spec, weights)
    fewer = "" if held.format == "int4" else " or fewer bits (--format int4)"
    raise ConfigError(
        f"expert_memory is {limit}, but with all but the experts and the KV cache of one conversation, which need "
        f"{size(others)}, it does not fit into the {size(free)} that are free.",
        f"Give at most {room} (--expert-memory)." if room >= smallest else f"Give it more memory{fewer}.",
    )


def _require_mapped(checkpoint: Checkpoint, spec: ModelSpec, held: Holding) -> None:
    forms = model_forms(checkpoint, spec, held.format)
    for name in expert_tensors(spec):
        info = checkpoint.tensors[name]
        if name not in forms and not is_mapped(info, held.dtype):
            raise ConfigError(
                f"expert_memory needs experts that are read from their file as they are, but {name}, stored as "
                f"{info.dtype}, is converted to be held as {held.name}.",
                "Give --format int8 or int4, whose experts are packed in files of their own, or leave --expert-memory "
                "out.",
            )


def _smallest(spec: ModelSpec, held: Mapping[str, int]) -> int:
    """Bytes of the experts that one token needs in the layer where these are most."""
    top_k = {index: layer.gate.top_k for index, layer in enumerate(spec.layers) if isinstance(layer, MoESpec)}
    return max(
        top_k[index] * sum(held[name] for name in experts.tensors(index, 0))
        for index, experts in expert_layers(spec).items()
    )
