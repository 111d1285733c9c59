"""The experts of one model as workers and the controller know them: where they are, their shapes, their size.

Torch-free. The router makes it from a model's spec; everyone else reads it as JSON.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experts.checkpoint import Checkpoint
from experts.formats import BYTES_PER_VALUE, held_dtype_of
from experts.spec import FFNSpec

_SAMPLES = 64  # of each file
_SAMPLE_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertModel:
    """path: the checkpoint, at the same place on every worker's node. dtype: torch's name of the rows' dtype.

    top_k: experts a token. layers: FFNSpec of each layer that has experts. digest: of the checkpoint's identity.
    """

    path: Path
    dtype: str
    top_k: int
    layers: dict[int, FFNSpec]
    digest: bytes

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
        )


def checkpoint_digest(checkpoint: Checkpoint, dtype: str) -> bytes:
    """16 bytes that tell one checkpoint, held as `dtype`, from another without reading all of its weights.

    blake2b of the configuration, of each tensor's name, dtype, shape and place in its file, and of a few samples of
    each file. Two checkpoints that pass for one differ in the digests of their experts.
    """
    tensors = [
        (name, info.dtype, list(info.shape), info.file.name, info.offset, info.nbytes)
        for name, info in sorted(checkpoint.tensors.items())
    ]
    identity = json.dumps([checkpoint.config, tensors, dtype], sort_keys=True, default=str)
    digest = hashlib.blake2b(identity.encode(), digest_size=16)
    for file in sorted({info.file for info in checkpoint.tensors.values()}):
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            for sample in range(_SAMPLES):
                stream.seek(size * sample // _SAMPLES)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.digest()


def expert_bytes(checkpoint: Checkpoint, model: ExpertModel) -> dict[int, int]:
    """Bytes of one expert in memory, by layer. Raises KeyError for a tensor that the checkpoint lacks."""
    return {
        layer: sum(
            shape[0] * shape[1] * BYTES_PER_VALUE[held_dtype_of(checkpoint.tensors[name], model.dtype)]
            for name, shape in spec.tensors(layer, 0).items()
        )
        for layer, spec in model.layers.items()
    }
