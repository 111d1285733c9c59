"""In which format weights are held in memory. Torch-free."""

from __future__ import annotations

from experts.formats.formats import FP8, INT4, INT8, KEPT_FROM_GGUF, MXFP4, Q4_0, Q8_0, QUANTISED, TILED, Format
from experts.formats.forms import Group, forms_of, held_bytes_of
from experts.formats.held import (
    BYTES_PER_VALUE,
    PLAIN,
    Holding,
    held_dtype,
    held_dtype_of,
    holding,
    is_mapped,
    main_dtype,
)

__all__ = [
    "BYTES_PER_VALUE",
    "FP8",
    "INT4",
    "INT8",
    "KEPT_FROM_GGUF",
    "MXFP4",
    "PLAIN",
    "Q4_0",
    "Q8_0",
    "QUANTISED",
    "TILED",
    "Format",
    "Group",
    "Holding",
    "forms_of",
    "held_bytes_of",
    "held_dtype",
    "held_dtype_of",
    "holding",
    "is_mapped",
    "main_dtype",
]
