"""What a model will cost, computed from its files' headers: parameters, bytes per token, whether it fits. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from experts.checkpoint import Checkpoint
from experts.checkpoint.names import SCALE_SUFFIX, check_names
from experts.formats import BYTES_PER_VALUE, held_dtype, held_dtype_of, main_dtype
from router.model.families import model_spec
from router.model.spec import ModelSpec, MoESpec
from router.model.tensors import count_parameters, expert_tensors, ignored_tensors, trunk_tensors

EMBEDDING = "model.embed_tokens.weight"
# Whether a model fits is asked for one conversation of this length, in tokens, or the model's own limit if shorter.
CONVERSATION = 4096


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """One model's figures. Parameters are weights, sizes are bytes.

    parameters: all that are used. active_parameters: those read for one token, without the input embedding table
    unless it is the head too. dtype, file_bytes: of the tensors as stored. held_dtype, held_bytes: as the engine holds
    them in memory, which is what a token reads of: active_bytes_per_token. memory_bytes: what serving needs, the held
    weights and the KV cache of one conversation of 4,096 tokens. num_experts, top_k: in one MoE layer, 0 for a dense
    model. shared_intermediate_size: of the shared experts' FFN.
    """

    family: str
    dtype: str
    held_dtype: str
    num_layers: int
    num_moe_layers: int
    num_experts: int
    top_k: int
    shared_intermediate_size: int
    max_model_len: int
    parameters: int
    active_parameters: int
    file_bytes: int
    held_bytes: int
    active_bytes_per_token: int
    kv_bytes_per_token: int
    memory_bytes: int
    memory_available: int
    fits: bool


def inspect_checkpoint(checkpoint: Checkpoint, memory_available: int) -> Inspection:
    """The figures of a checkpoint on a machine with this many free bytes.

    Raises CheckpointError: an unknown architecture, or a missing, unexpected or misshapen tensor.
    """
    spec = model_spec(checkpoint.config)
    check_names(trunk_tensors(spec) | expert_tensors(spec), checkpoint, ignored_tensors(spec))
    moe_layers = [layer for layer in spec.layers if isinstance(layer, MoESpec)]
    parameters, active_parameters = count_parameters(spec)
    held = held_bytes(checkpoint, spec)
    kv_bytes = spec.kv_values_per_token * BYTES_PER_VALUE[held_dtype(checkpoint)]
    memory = sum(held.values()) + kv_bytes * min(CONVERSATION, spec.max_position)
    return Inspection(
        family=spec.family,
        dtype=main_dtype(checkpoint),
        held_dtype=held_dtype(checkpoint),
        num_layers=spec.num_layers,
        num_moe_layers=len(moe_layers),
        num_experts=spec.num_experts,
        top_k=max((layer.gate.top_k for layer in moe_layers), default=0),
        shared_intermediate_size=max((layer.shared_intermediate_size for layer in moe_layers), default=0),
        max_model_len=spec.max_position,
        parameters=parameters,
        active_parameters=active_parameters,
        file_bytes=stored_bytes(checkpoint, held),
        held_bytes=sum(held.values()),
        active_bytes_per_token=_active_bytes(spec, held),
        kv_bytes_per_token=kv_bytes,
        memory_bytes=memory,
        memory_available=memory_available,
        fits=memory <= memory_available,
    )


def stored_bytes(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    """Bytes of these tensors in the files, with the block scales of the quantised ones."""
    total = 0
    for name in names:
        scales = checkpoint.tensors.get(name + SCALE_SUFFIX)
        total += checkpoint.tensors[name].nbytes + (scales.nbytes if scales else 0)
    return total


def held_bytes(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, int]:
    """Bytes of each used tensor as the engine holds it: dequantised, and in float32 where the gate computes in it."""
    model_dtype, float32 = held_dtype(checkpoint), _float32_tensors(spec)
    held = {}
    for name, shape in (trunk_tensors(spec) | expert_tensors(spec)).items():
        dtype = "float32" if name in float32 else held_dtype_of(checkpoint.tensors[name], model_dtype)
        held[name] = math.prod(shape) * BYTES_PER_VALUE[dtype]
    return held


def _float32_tensors(spec: ModelSpec) -> set[str]:
    """Gates with float32 logits, and the biases of their choice."""
    moe_layers = [(index, layer) for index, layer in enumerate(spec.layers) if isinstance(layer, MoESpec)]
    gates = {layer.gate_name.format(layer=i) for i, layer in moe_layers if layer.gate.float32_logits}
    return gates | {layer.select_bias_name.format(layer=i) for i, layer in moe_layers}


def _active_bytes(spec: ModelSpec, held: dict[str, int]) -> int:
    """What one token reads: the trunk, but one row of an untied embedding table, and the top-k's share of each layer's
    experts, which are all of one size."""
    total = sum(held[name] for name in trunk_tensors(spec))
    if not spec.tied_embeddings:
        total += held[EMBEDDING] // spec.vocab_size - held[EMBEDDING]
    for index, layer in enumerate(spec.layers):
        if isinstance(layer, MoESpec):
            names = (name for e in range(layer.gate.num_experts) for name in layer.experts.tensors(index, e))
            total += sum(held[name] for name in names) * layer.gate.top_k // layer.gate.num_experts
    return total
