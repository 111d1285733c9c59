"""In which format a checkpoint's weights are held in memory. Torch-free."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from experts.checkpoint import Checkpoint, TensorInfo
from experts.formats.formats import FP8, KEPT_FROM_GGUF

# Stored with no more precision than bfloat16 holds; every other stored dtype is held in float32 unless told otherwise.
HELD_AS_BF16 = ("BF16", "F8_E4M3")
FORMATS = {"float32": "float32", "bf16": "bfloat16"}
BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float16": 2}
_PLAIN_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
PLAIN, GGUF = "plain", "gguf"


@dataclass(frozen=True, slots=True)
class Holding:
    """How a model is held. dtype: torch's name of the rows' dtype, and of each tensor that is not of few bits.

    format: of the matrices of few bits (experts/formats/forms.py): the name of one of QUANTISED; "gguf": blocks of Q8_0
    and Q4_0 as they are stored; "plain": there are none.
    """

    dtype: str
    format: str = PLAIN

    @property
    def name(self) -> str:
        """For people: as in `--format`, or gguf."""
        plain = {dtype: name for name, dtype in FORMATS.items()}
        return plain[self.dtype] if self.format == PLAIN else self.format


def holding(checkpoint: Checkpoint, wanted: str = "auto") -> Holding:
    """How the checkpoint is held when `--format` asks for `wanted`; "auto" stands for: as it is stored."""
    if wanted in FORMATS:
        return Holding(FORMATS[wanted])
    dtype = held_dtype(checkpoint)
    if wanted != "auto":
        return Holding(dtype, wanted)
    if main_dtype(checkpoint) == "F8_E4M3":
        return Holding(dtype, FP8.name)
    has_blocks = any(info.dtype in KEPT_FROM_GGUF for info in checkpoint.tensors.values())
    return Holding(dtype, GGUF if has_blocks else PLAIN)


def main_dtype(checkpoint: Checkpoint) -> str:
    """The stored dtype that holds the most bytes; "none" where nothing is stored."""
    held: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        held[info.dtype] += info.nbytes
    return held.most_common(1)[0][0] if held else "none"


def held_dtype(checkpoint: Checkpoint, wanted: str = "auto") -> str:
    """torch's name of the model's dtype: as asked for by format ("float32", "bf16"), or as stored ("auto")."""
    if wanted != "auto":
        return FORMATS[wanted]
    return "bfloat16" if main_dtype(checkpoint) in HELD_AS_BF16 else "float32"


def is_mapped(info: TensorInfo, model_dtype: str) -> bool:
    """Whether a matrix that is not of few bits is held as a view of its file, not as a converted copy."""
    dtype = _PLAIN_DTYPES.get(info.dtype)
    if dtype is None or info.interleaved_heads:
        return False
    return dtype == held_dtype_of(info, model_dtype) and info.offset % BYTES_PER_VALUE[dtype] == 0


def held_dtype_of(info: TensorInfo, model_dtype: str) -> str:
    """The dtype that a tensor is held in: the model's, but a float16 matrix of a float32 model stays as it is stored.

    The kernels widen it exactly, so that the results are those of float32 weights at half the bytes.
    """
    stays = info.dtype == "F16" and len(info.shape) == 2 and model_dtype == "float32"
    return "float16" if stays else model_dtype
