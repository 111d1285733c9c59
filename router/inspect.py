"""What a model will cost, computed from its files' headers: parameters, bytes per token, whether it fits. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from experts.checkpoint import Checkpoint
from experts.checkpoint.names import SCALE_SUFFIX, check_names
from experts.formats import main_dtype
from router.expert_memory import check_expert_memory
from router.format_choice import choose_format, memory_needed
from router.memory import held_bytes, kv_bytes_per_token
from router.model.families import model_spec
from router.model.spec import ModelSpec, MoESpec
from router.model.tensors import count_parameters, expert_tensors, ignored_tensors, trunk_tensors

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """One model's figures. Parameters are weights, sizes are bytes.

    parameters: all that are used. active_parameters: those read for one token, without the input embedding table
    unless it is the head too. dtype, file_bytes: of the tensors as stored. format, held_dtype, held_bytes: as the
    engine holds them in memory, which is what a token reads of: active_bytes_per_token; reason: why in this format, if
    it was chosen for its size. memory_bytes: what serving needs, the held weights, of the experts no more than may be
    in memory, and the KV cache of one conversation of 4,096 tokens. num_experts, top_k: in one MoE layer, 0 for a dense
    model. shared_intermediate_size: of the shared experts' FFN. expert_bytes: of held_bytes, all routed experts.
    """

    family: str
    dtype: str
    format: str
    reason: str
    held_dtype: str
    num_layers: int
    num_moe_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    shared_intermediate_size: int
    max_model_len: int
    parameters: int
    active_parameters: int
    file_bytes: int
    held_bytes: int
    expert_bytes: int
    active_bytes_per_token: int
    kv_bytes_per_token: int
    memory_bytes: int
    memory_available: int
    fits: bool


def inspect_checkpoint(
    checkpoint: Checkpoint, memory_available: int, wanted: str = "auto", expert_memory: int | None = None
) -> Inspection:
    """The figures of a checkpoint on a machine with this many free bytes. wanted: as in `--format`.

    expert_memory: as in `--expert-memory`. Raises CheckpointError: an unknown architecture, a missing, unexpected or
    misshapen tensor, or a shape that the format cannot take; ConfigError: an expert_memory that the model cannot keep.
    """
    spec = model_spec(checkpoint.config)
    check_names(trunk_tensors(spec) | expert_tensors(spec), checkpoint, ignored_tensors(spec))
    moe_layers = [layer for layer in spec.layers if isinstance(layer, MoESpec)]
    parameters, active_parameters = count_parameters(spec)
    choice = choose_format(checkpoint, spec, wanted, memory_available, expert_memory)
    if expert_memory is not None:
        check_expert_memory(checkpoint, spec, choice.held, expert_memory)
    held = held_bytes(checkpoint, spec, choice.held)
    memory = memory_needed(checkpoint, spec, choice.held, expert_memory)
    return Inspection(
        family=spec.family,
        dtype=main_dtype(checkpoint),
        format=choice.held.name,
        reason=choice.reason,
        held_dtype=choice.held.dtype,
        num_layers=spec.num_layers,
        num_moe_layers=len(moe_layers),
        num_experts=spec.num_experts,
        top_k=max((layer.gate.top_k for layer in moe_layers), default=0),
        hidden_size=spec.hidden_size,
        shared_intermediate_size=max((layer.shared_intermediate_size for layer in moe_layers), default=0),
        max_model_len=spec.max_position,
        parameters=parameters,
        active_parameters=active_parameters,
        file_bytes=stored_bytes(checkpoint, held),
        held_bytes=sum(held.values()),
        expert_bytes=sum(held[name] for name in expert_tensors(spec)),
        active_bytes_per_token=active_bytes(spec, held),
        kv_bytes_per_token=kv_bytes_per_token(spec, choice.held),
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


def active_bytes(spec: ModelSpec, held: dict[str, int]) -> int:
    """What one token reads: the trunk, but one row of an untied embedding table, and the top-k's share of each layer's
    experts, which are all of one size. held: as router.memory.held_bytes gives it."""
    total = sum(held[name] for name in trunk_tensors(spec))
    if not spec.tied_embeddings:
        total += held[EMBEDDING] // spec.vocab_size - held[EMBEDDING]
    for index, layer in enumerate(spec.layers):
        if isinstance(layer, MoESpec):
            names = (name for e in range(layer.gate.num_experts) for name in layer.experts.tensors(index, e))
            total += sum(held[name] for name in names) * layer.gate.top_k // layer.gate.num_experts
    return total
