"""The experts of one model as workers and the controller know them: where they are, their shapes, their size.

Torch-free. The router makes it from a model's spec; everyone else reads it as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experts.checkpoint import Checkpoint
from experts.formats import PLAIN, Group, forms_of, held_bytes_of
from experts.spec import FFNSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertModel:
    """path: the checkpoint, at the same place on every worker's node. dtype: torch's name of the rows' dtype.

    top_k: experts a token. layers: FFNSpec of each layer that has experts. digest: of the checkpoint's identity and of
    how it is held. format: of the experts' weights, as in experts.formats.Holding.
    """

    path: Path
    dtype: str
    top_k: int
    layers: dict[int, FFNSpec]
    digest: bytes
    format: str = PLAIN

    @property
    def hidden_size(self) -> int:
        """Values in a row."""
        return next(iter(self.layers.values())).hidden_size

    @property
    def num_experts(self) -> int:
        """(layer, expert) pairs in the whole model."""
        return sum(spec.num_experts for spec in self.layers.values())

    def to_json(self) -> str:
        """For from_json in another process."""
        value: dict[str, Any] = asdict(self)
        return json.dumps(value | {"path": str(self.path), "digest": self.digest.hex()})

    @classmethod
    def from_json(cls, text: str) -> ExpertModel:
        """What to_json wrote."""
        value = json.loads(text)
        return cls(
            path=Path(value["path"]),
            dtype=value["dtype"],
            top_k=value["top_k"],
            layers={int(layer): FFNSpec(**spec) for layer, spec in value["layers"].items()},
            digest=bytes.fromhex(value["digest"]),
            format=value["format"],
        )


def expert_groups(layers: Mapping[int, FFNSpec]) -> Iterator[Group]:
    """The experts' matrices, layer by layer: one kernel call computes all experts of a layer."""
    for layer, spec in layers.items():
        yield {name: shape for expert in range(spec.num_experts) for name, shape in spec.tensors(layer, expert).items()}


def expert_bytes(checkpoint: Checkpoint, model: ExpertModel) -> dict[int, int]:
    """Bytes of one expert in memory, by layer.

    Raises KeyError for a tensor that the checkpoint lacks, CheckpointError for a shape that the format cannot take.
    """
    forms = forms_of(checkpoint, expert_groups(model.layers), model.format)
    return {
        layer: sum(
            held_bytes_of(checkpoint.tensors[name], forms.get(name), model.dtype) for name in spec.tensors(layer, 0)
        )
        for layer, spec in model.layers.items()
    }
