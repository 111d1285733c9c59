"""Which matrices of a model are of few bits, and in which format each. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from experts.checkpoint import Checkpoint, TensorInfo
from experts.formats.formats import FP8, KEPT_FROM_GGUF, QUANTISED, Format
from experts.formats.held import BYTES_PER_VALUE, GGUF, held_dtype_of, main_dtype

# Name -> shape [out, in] of matrices that one kernel call takes together, and that are of one format therefore.
Group = Mapping[str, tuple[int, ...]]

# What a stored dtype becomes without loss, by the format that is asked for: nothing of it is encoded again.
_AS_STORED: dict[str, dict[str, Format]] = {
    "fp8": {"F8_E4M3": FP8},
    "int8": {"Q8_0": KEPT_FROM_GGUF["Q8_0"]},
    "int4": {"Q4_0": KEPT_FROM_GGUF["Q4_0"]},
    GGUF: KEPT_FROM_GGUF,
}


def forms_of(checkpoint: Checkpoint, groups: Iterable[Group], weight_format: str) -> dict[str, Format]:
    """The format of each matrix in these groups; a plain one is left out. weight_format: as in `Holding`.

    Raises CheckpointError for a shape that the format cannot take, KeyError for a tensor that the checkpoint lacks.
    """
    has_fp8 = main_dtype(checkpoint) == "F8_E4M3"
    forms: dict[str, Format] = {}
    for group in groups:
        form = _form_of(checkpoint, group, weight_format, has_fp8)
        if form is not None:
            forms |= dict.fromkeys(group, form)
    return forms


def _form_of(checkpoint: Checkpoint, group: Group, weight_format: str, has_fp8: bool) -> Format | None:
    stored = {checkpoint.tensors[name].dtype for name in group}
    kept = _AS_STORED.get(weight_format, {}).get(stored.pop()) if len(stored) == 1 else None
    if kept is not None and all(kept.takes(shape) for shape in group.values()):
        return kept
    form = QUANTISED.get(weight_format)
    if form is None or (form is FP8 and has_fp8):  # what such a checkpoint holds in other dtypes was meant to stay so
        return None
    for name, shape in group.items():
        form.check(shape, f"{checkpoint.path}: tensor {name}")
    return form


def held_bytes_of(info: TensorInfo, form: Format | None, dtype: str) -> int:
    """Bytes of a tensor in memory. form: None for a plain one. dtype: the model's."""
    if form is not None:
        return form.nbytes(info.shape)
    return math.prod(info.shape) * BYTES_PER_VALUE[held_dtype_of(info, dtype)]
