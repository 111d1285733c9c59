"""What tells one checkpoint from another without reading all of its weights."""

from __future__ import annotations

import hashlib
import json

from experts.checkpoint.types import Checkpoint

_SAMPLES = 64  # of each file
_SAMPLE_BYTES = 64


def checkpoint_digest(checkpoint: Checkpoint, *held: str) -> bytes:
    """16 bytes that tell one checkpoint, held as `held` says (dtype, format), from another.

    blake2b of the configuration, of each tensor's name, dtype, shape and place in its file, and of a few samples of
    each file. Two checkpoints that pass for one differ in the digests of their experts.
    """
    tensors = [
        (name, info.dtype, list(info.shape), info.file.name, info.offset, info.nbytes)
        for name, info in sorted(checkpoint.tensors.items())
    ]
    identity = json.dumps([checkpoint.config, tensors, held], sort_keys=True, default=str)
    digest = hashlib.blake2b(identity.encode(), digest_size=16)
    for file in sorted({info.file for info in checkpoint.tensors.values()}):
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            for sample in range(_SAMPLES):
                stream.seek(size * sample // _SAMPLES)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.digest()
