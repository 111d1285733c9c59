"""A model's packed cache: its routed experts, as workers pack them too, and the matrices of its trunk. Torch-free."""

from __future__ import annotations

from experts.checkpoint import Checkpoint
from experts.expert_model import expert_groups
from experts.formats import Format, forms_of
from experts.packed.experts import expert_part
from experts.packed.layout import Part, plan_part
from experts.spec import FFNSpec
from router.model.spec import ModelSpec, MoESpec
from router.model.tensors import trunk_groups


def expert_layers(spec: ModelSpec) -> dict[int, FFNSpec]:
    """The routed experts of each layer that has any."""
    return {index: layer.experts for index, layer in enumerate(spec.layers) if isinstance(layer, MoESpec)}


def model_forms(checkpoint: Checkpoint, spec: ModelSpec, weight_format: str) -> dict[str, Format]:
    """The format of each matrix of few bits (experts.formats.forms_of), of trunk and experts."""
    return forms_of(checkpoint, [*trunk_groups(spec), *expert_groups(expert_layers(spec))], weight_format)


def packed_experts(checkpoint: Checkpoint, spec: ModelSpec, weight_format: str) -> Part:
    """See experts.packed.experts."""
    return expert_part(checkpoint, expert_layers(spec), weight_format)


def packed_trunk(checkpoint: Checkpoint, spec: ModelSpec, weight_format: str) -> Part:
    """One file. weight_format: as in `Holding`. Raises CheckpointError for a shape that the format cannot take."""
    groups = trunk_groups(spec)
    return plan_part(
        checkpoint, "trunk", weight_format, forms_of(checkpoint, groups, weight_format), {"trunk.bin": groups}
    )
