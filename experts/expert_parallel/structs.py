"""The structs of cuda/ep_window.h and cuda/ep.h, field by field."""

from __future__ import annotations

import ctypes
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64
from ctypes import c_void_p as pointer

MAX_RANKS = 16
MAX_TOP_K = 32
MAX_COUNTS = 8192
MAX_LOCAL_RANKS = 8
GROUP = 128

DISPATCH, COMBINE = 0, 1  # enum ep_phase

# enum ep_status
TIMED_OUT, ABORTED, BAD_ID, OVERFLOW, UNREACHABLE = 1, 2, 4, 8, 16


class ShapeStruct(ctypes.Structure):
    """struct ep_shape."""

    _fields_ = tuple(
        (name, u32)
        for name in (
            "size",
            "num_ranks",
            "num_experts",
            "max_local_experts",
            "top_k",
            "max_tokens",
            "max_rows",
            "hidden",
            "value",
            "wire",
            "combine",
            "routing",
            "alignment",
            "num_sources",
        )
    )


class OffsetsStruct(ctypes.Structure):
    """struct ep_offsets."""

    _fields_ = tuple(
        (name, u64)
        for name in (
            "cells",
            "counts",
            "bases",
            "experts",
            "ordinals",
            "weights",
            "rows",
            "scales",
            "out",
            "sums",
            "total",
        )
    )


class StateStruct(ctypes.Structure):
    """struct ep_state."""

    _fields_ = (
        ("size", u32),
        ("epoch", u32),
        ("alive", u32),
        ("status", u32),
        ("sent", u32 * MAX_RANKS),
        ("got", u32 * MAX_RANKS),
    )


class RankStruct(ctypes.Structure):
    """struct ep_rank."""

    _fields_ = (
        ("size", u32),
        ("rank", u32),
        ("shape", ShapeStruct),
        ("timeout_ns", u64),
        ("windows", pointer * MAX_RANKS),
        ("state", pointer),
        ("expert_rank", pointer),
        ("expert_index", pointer),
        ("num_tokens", u32),
        ("num_local_experts", u32),
        ("hidden_states", pointer),
        ("topk_ids", pointer),
        ("topk_weights", pointer),
        ("slots", pointer),
        ("ordinals", pointer),
        ("output", pointer),
        ("failed", pointer),
        ("expert_rows", pointer),
        ("expert_ends", pointer),
        ("expert_results", pointer),
    )
