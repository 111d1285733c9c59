"""What the attention of every layer takes of one step: the rows, where they are cached, what they attend to."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from experts.kernels.structs import pointer

_P, _L = ctypes.c_void_p, ctypes.c_int64


class StepStruct(ctypes.Structure):
    """bk_step of src/barista_kernels.h."""

    _fields_ = (
        ("size", _L),
        ("num_rows", _L),
        ("half", _L),
        ("max_blocks", _L),
        ("block_size", _L),
        ("layer_stride", _L),
        ("plane_stride", _L),
        ("residual", _P),
        ("cache", _P),
        ("cos", _P),
        ("sin", _P),
        ("slots", _P),
        ("seq_ids", _P),
        ("positions", _P),
        ("block_tables", _P),
    )


def step_struct(
    cache: Tensor, *, slots: Tensor, seq_ids: Tensor, positions: Tensor, block_tables: Tensor
) -> StepStruct:
    """A step without its residual, cos and sin. Shapes as in StepRows, which the caller keeps alive."""
    assert slots.dtype is seq_ids.dtype is positions.dtype is block_tables.dtype is torch.int32
    return StepStruct(
        size=ctypes.sizeof(StepStruct),
        num_rows=len(positions),
        max_blocks=block_tables.shape[1],
        block_size=cache.shape[3],
        layer_stride=cache.stride(0),
        plane_stride=cache.stride(1),
        cache=pointer(cache),
        slots=pointer(slots),
        seq_ids=pointer(seq_ids),
        positions=pointer(positions),
        block_tables=pointer(block_tables),
    )


class StepRows:
    """One step's tensors, handed to compiled code once and not once a layer.

    residual: [num_rows, hidden], updated in place by every layer. cache: [layers, planes, blocks, block_size, heads,
    dim] in residual's dtype. cos, sin: [num_rows, half] float32. slots, seq_ids, positions: [num_rows] int32;
    block_tables: [num_seqs, max_blocks] int32, all as kernels.store_kv and kernels.attention take them. All contiguous.
    """

    def __init__(
        self,
        residual: Tensor,
        cache: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        slots: Tensor,
        seq_ids: Tensor,
        positions: Tensor,
        block_tables: Tensor,
    ) -> None:
        assert cache.dtype is residual.dtype
        assert cos.dtype is sin.dtype is torch.float32
        self.residual, self.cache, self.cos, self.sin = residual, cache, cos, sin
        self.slots, self.seq_ids, self.positions, self.block_tables = slots, seq_ids, positions, block_tables
        self._struct = step_struct(cache, slots=slots, seq_ids=seq_ids, positions=positions, block_tables=block_tables)
        self._struct.half = cos.shape[1]
        self._struct.residual, self._struct.cos, self._struct.sin = map(pointer, (residual, cos, sin))
        self.address = ctypes.addressof(self._struct)

    def empty_rows(self) -> Tensor:
        """Room for rows like the residual's."""
        return torch.empty_like(self.residual)
