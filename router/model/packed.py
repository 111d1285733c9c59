"""A model's packed cache: its routed experts, as workers pack them too, and the matrices of its trunk. Torch-free."""

from __future__ import annotations

from experts.checkpoint import Checkpoint
from experts.expert_model import expert_groups
from experts.formats import INT4, INT8, MXFP4, Format, forms_of
from experts.packed.experts import expert_part
from experts.packed.layout import Part, plan_part
from experts.spec import FFNSpec
from router.model.spec import ModelSpec, MoESpec
from router.model.tensors import trunk_groups

EMBEDDING = "model.embed_tokens.weight"


def expert_layers(spec: ModelSpec) -> dict[int, FFNSpec]:
    """The routed experts of each layer that has any."""
    return {index: layer.experts for index, layer in enumerate(spec.layers) if isinstance(layer, MoESpec)}


def model_forms(checkpoint: Checkpoint, spec: ModelSpec, weight_format: str) -> dict[str, Format]:
    """The format of each matrix of few bits (experts.formats.forms_of), of trunk and experts."""
    trunk = _trunk_forms(checkpoint, spec, weight_format)
    return trunk | forms_of(checkpoint, expert_groups(expert_layers(spec)), weight_format)


def packed_experts(checkpoint: Checkpoint, spec: ModelSpec, weight_format: str) -> Part:
    """See experts.packed.experts."""
    return expert_part(checkpoint, expert_layers(spec), weight_format)


def packed_trunk(checkpoint: Checkpoint, spec: ModelSpec, weight_format: str) -> Part:
    """One file. weight_format: as in `Holding`. Raises CheckpointError for a shape that the format cannot take."""
    forms = _trunk_forms(checkpoint, spec, weight_format)
    return plan_part(checkpoint, "trunk", weight_format, forms, {"trunk.bin": trunk_groups(spec)})


def _trunk_forms(checkpoint: Checkpoint, spec: ModelSpec, weight_format: str) -> dict[str, Format]:
    """An embedding that is the head too keeps 8 bits: in 4 it costs as much as all the rest (docs/precision.md)."""
    forms = forms_of(checkpoint, trunk_groups(spec), weight_format)
    if spec.tied_embeddings and forms.get(EMBEDDING) in (INT4, MXFP4):
        forms[EMBEDDING] = INT8
    return forms
