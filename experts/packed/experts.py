"""The part of the packed cache that workers need: the routed experts, a file for each layer. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping

from experts.checkpoint import Checkpoint
from experts.expert_model import expert_groups
from experts.formats import forms_of
from experts.packed.layout import Part, plan_part
from experts.spec import FFNSpec


def expert_part(checkpoint: Checkpoint, layers: Mapping[int, FFNSpec], weight_format: str) -> Part:
    """Each expert begins on a page, so that whoever maps one reads no other. weight_format: as in `Holding`.

    Raises KeyError for a tensor that the checkpoint lacks, CheckpointError for a shape that the format cannot take.
    """
    forms = forms_of(checkpoint, expert_groups(layers), weight_format)
    files = {
        f"layer-{layer:05}.bin": [spec.tensors(layer, expert) for expert in range(spec.num_experts)]
        for layer, spec in layers.items()
    }
    return plan_part(checkpoint, "experts", weight_format, forms, files)
