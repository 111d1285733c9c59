"""Experts stored as one 3-D tensor, presented as one 2-D tensor per expert: slices by offset, no copy.

transformers v5 keeps a layer's routed experts as `gate_up_proj` [num_experts, 2 * intermediate, hidden] (gate rows
first) and `down_proj` [num_experts, hidden, intermediate]; some checkpoints are published in that form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from barista.errors import CheckpointError
from experts.checkpoint.types import DOWNLOAD_AGAIN, TensorInfo

_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")


def split_experts(info: TensorInfo, templates: Sequence[str]) -> Iterator[TensorInfo]:
    """[num_experts, rows, columns] as num_experts * len(templates) matrices [rows / len(templates), columns].

    templates: names with {expert}, in the order of their rows within one expert. Raises CheckpointError for a tensor
    that cannot be cut so.
    """
    # An empty tensor may claim any number of experts: its shape is not bounded by the file's size.
    if len(info.shape) != 3 or 0 in info.shape or info.shape[1] % len(templates):
        raise CheckpointError(
            f"{info.file}: tensor {info.name} has shape {list(info.shape)}, expected [experts, rows, columns] "
            f"with rows for {len(templates)} matrices.",
            DOWNLOAD_AGAIN,
        )
    num_experts, rows, columns = info.shape
    part = info.nbytes // (num_experts * len(templates))
    names = (template.format(expert=expert) for expert in range(num_experts) for template in templates)
    for index, name in enumerate(names):
        shape = (rows // len(templates), columns)
        yield replace(info, name=name, shape=shape, offset=info.offset + index * part, nbytes=part)


def unfuse(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The same tensors with every fused 3-D expert tensor replaced by its slices."""
    unfused: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        match = _FUSED.fullmatch(name)
        if match is None:
            unfused[name] = info
            continue
        roles = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
        templates = [f"{match[1]}.{{expert}}.{role}.weight" for role in roles]
        unfused.update((part.name, part) for part in split_experts(info, templates))
    return unfused
