"""In which format weights are held in memory. Torch-free."""

from __future__ import annotations

from experts.formats.formats import FP8, INT4, INT8, MXFP4, Q4_0, Q8_0, QUANTISED, TILED, Format
from experts.formats.held import BYTES_PER_VALUE, held_dtype, held_dtype_of, main_dtype

__all__ = [
    "BYTES_PER_VALUE",
    "FP8",
    "INT4",
    "INT8",
    "MXFP4",
    "Q4_0",
    "Q8_0",
    "QUANTISED",
    "TILED",
    "Format",
    "held_dtype",
    "held_dtype_of",
    "main_dtype",
]
