"""How much memory a model takes, held in one way or another. Torch-free."""

from __future__ import annotations

from barista.cache import size
from barista.errors import ConfigError
from experts.checkpoint import Checkpoint
from experts.checkpoint.names import check_names
from experts.formats import BYTES_PER_VALUE, Holding, held_bytes_of
from router.model.families import model_spec
from router.model.packed import model_forms
from router.model.spec import ModelSpec, MoESpec
from router.model.tensors import expert_tensors, ignored_tensors, trunk_tensors

# Whether a model fits is asked for one conversation of this length, in tokens, or the model's own limit if shorter.
CONVERSATION = 4096


def held_bytes(checkpoint: Checkpoint, spec: ModelSpec, held: Holding) -> dict[str, int]:
    """Bytes of each used tensor as the engine holds it: of few bits where `held` says so, otherwise dequantised, and in
    float32 where the gate computes in it. Raises CheckpointError for a shape that the format cannot take."""
    float32, forms = _float32_tensors(spec), model_forms(checkpoint, spec, held.format)
    return {
        name: held_bytes_of(checkpoint.tensors[name], forms.get(name), "float32" if name in float32 else held.dtype)
        for name in trunk_tensors(spec) | expert_tensors(spec)
    }


def kv_bytes_per_token(spec: ModelSpec, held: Holding) -> int:
    """Bytes of cache for one token over all layers."""
    return spec.kv_values_per_token * BYTES_PER_VALUE[held.dtype]


def conversation_bytes(spec: ModelSpec, held: Holding) -> int:
    """The KV cache of one conversation."""
    return kv_bytes_per_token(spec, held) * min(CONVERSATION, spec.max_position)


def require_room_for_trunk(checkpoint: Checkpoint, held: Holding, free: int) -> None:
    """Raises ConfigError unless the trunk fits into `free` bytes: every token reads all of it.

    CheckpointError: an unknown architecture, a missing tensor, or a shape that the format cannot take.
    """
    spec = model_spec(checkpoint.config)
    check_names(trunk_tensors(spec) | expert_tensors(spec), checkpoint, ignored_tensors(spec))
    weights = held_bytes(checkpoint, spec, held)
    needed = sum(weights[name] for name in trunk_tensors(spec))
    if needed > free:
        fewer = "" if held.format == "int4" else " or fewer bits (--format int4)"
        raise ConfigError(
            f"{checkpoint.path}: all but its experts needs {size(needed)} of memory in {held.name}; "
            f"{size(free)} are free.",
            f"Give it more memory{fewer}, or take a smaller model: see `barista inspect`.",
        )


def _float32_tensors(spec: ModelSpec) -> set[str]:
    """Gates with float32 logits, and the biases of their choice."""
    moe_layers = [(index, layer) for index, layer in enumerate(spec.layers) if isinstance(layer, MoESpec)]
    gates = {layer.gate_name.format(layer=i) for i, layer in moe_layers if layer.gate.float32_logits}
    return gates | {layer.select_bias_name.format(layer=i) for i, layer in moe_layers}
