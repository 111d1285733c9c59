"""CPU kernels: C++ over vector extensions (src/), compiled once per instruction set and called through ctypes.

Every function is row-invariant: a row of its result depends on that row's inputs alone, to the byte. It does not depend
on the other rows, on their number or order, on the number of threads, or on alignment. Bytes differ between
instruction sets; numerics_id() names what they depend on.

Without a compiler the functions of experts.kernels.reference stand in, with one logged warning.
"""

from __future__ import annotations

from experts.kernels.expert_table import ExpertTable
from experts.kernels.gate_layer import GateLayer
from experts.kernels.gqa import GQALayer, GQAParts
from experts.kernels.layer_tables import LayerTables, layer_tables
from experts.kernels.library import current as compiled
from experts.kernels.library import load, numerics_id, set_num_threads
from experts.kernels.mla import MLALayer, MLAParts
from experts.kernels.ops import attention, gate, linear, moe, rms_norm, rope, silu_mul, store_kv
from experts.kernels.routing import place_rows, route, split
from experts.kernels.rows import combine_rows, expert_rows, find_nonfinite
from experts.kernels.step_rows import StepRows
from experts.kernels.weight import Fp8Weight, TiledWeight, Weight, encode, encode_fp8, parts_of, take_rows
from experts.kernels.whole_model import LayerParts, WholeModel

__all__ = [
    "ExpertTable",
    "Fp8Weight",
    "GQALayer",
    "GQAParts",
    "GateLayer",
    "LayerParts",
    "LayerTables",
    "MLALayer",
    "MLAParts",
    "StepRows",
    "TiledWeight",
    "Weight",
    "WholeModel",
    "attention",
    "combine_rows",
    "compiled",
    "encode",
    "encode_fp8",
    "expert_rows",
    "find_nonfinite",
    "gate",
    "layer_tables",
    "linear",
    "load",
    "moe",
    "numerics_id",
    "parts_of",
    "place_rows",
    "rms_norm",
    "rope",
    "route",
    "set_num_threads",
    "silu_mul",
    "split",
    "store_kv",
    "take_rows",
]
