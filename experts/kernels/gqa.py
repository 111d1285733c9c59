"""One layer's grouped-query attention with the norms around it, in one call."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from experts.kernels import ops
from experts.kernels.library import current
from experts.kernels.step_rows import StepRows
from experts.kernels.structs import NormsStruct, WeightStruct, norms_struct, pointer, weight_struct
from experts.kernels.weight import Weight

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float

_QK_NORMS = {"none": 0, "per_head": 1, "full": 2}  # enum bk_qk_norm


class _GQAStruct(ctypes.Structure):
    """bk_gqa of src/barista_kernels.h."""

    _fields_ = (
        ("size", _L),
        ("norms", NormsStruct),
        ("q", WeightStruct),
        ("k", WeightStruct),
        ("v", WeightStruct),
        ("o", WeightStruct),
        ("q_bias", _P),
        ("k_bias", _P),
        ("v_bias", _P),
        ("o_bias", _P),
        ("q_norm", _P),
        ("k_norm", _P),
        ("index", _L),
        ("num_heads", _L),
        ("num_kv_heads", _L),
        ("head_dim", _L),
        ("scale", _F),
        ("clip", _F),
        ("qk_norm", _I),
        ("interleaved", _I),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GQAParts:
    """Layer `index`'s weights and constants. All rows and plain tensors but weights have attention_norm's dtype.

    q: [num_heads * head_dim, hidden]; k, v: [num_kv_heads * head_dim, hidden]; o: [hidden, num_heads * head_dim];
    biases: [their weight's out]; q_norm, k_norm: [head_dim] if qk_norm is per_head, [out] if full; attention_norm,
    ffn_norm: [hidden]. clip: q, k and v lie within +-clip. interleaved: of the rotation (kernels.rope).
    """

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    eps: float
    interleaved: bool
    qk_norm: Literal["none", "per_head", "full"]
    clip: float | None
    attention_norm: Tensor
    ffn_norm: Tensor
    q: Weight
    k: Weight
    v: Weight
    o: Weight
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


class GQALayer:
    """Call it in every step."""

    def __init__(self, parts: GQAParts) -> None:
        self._parts = parts
        dtype = parts.attention_norm.dtype
        self._struct = _GQAStruct(
            size=ctypes.sizeof(_GQAStruct),
            norms=norms_struct(parts.attention_norm, parts.ffn_norm, parts.eps),
            **{name: weight_struct(getattr(parts, name), dtype) for name in "qkvo"},
            **{f"{name}_bias": pointer(getattr(parts, f"{name}_bias")) for name in "qkvo"},
            q_norm=pointer(parts.q_norm),
            k_norm=pointer(parts.k_norm),
            index=parts.index,
            num_heads=parts.num_heads,
            num_kv_heads=parts.num_kv_heads,
            head_dim=parts.head_dim,
            scale=parts.scale,
            clip=0.0 if parts.clip is None else float(torch.tensor(parts.clip, dtype=dtype)),
            qk_norm=_QK_NORMS[parts.qk_norm],
            interleaved=parts.interleaved,
        )
        self.address = ctypes.addressof(self._struct)

    def __call__(self, update: Tensor | None, step: StepRows) -> Tensor:
        """residual += update; residual += attention(norm(residual)); returns norm(residual), what the FFN takes.

        update: [num_rows, hidden] contiguous, or None. Keys and values of the rows go to the cache.
        """
        functions = current()
        if functions is None:
            return gqa_in_steps(self._parts, update, step)
        x = step.empty_rows()
        status = functions.bk_gqa_layer(self.address, step.address, pointer(update), x.data_ptr())
        assert status == 0
        return x


def gqa_in_steps(parts: GQAParts, update: Tensor | None, step: StepRows) -> Tensor:
    """The same, to the byte, one kernel after another: what GQALayer means."""
    x = ops.add_norm(update, step.residual, parts.attention_norm, parts.eps)
    q, k, v = (
        ops.linear(x, weight, bias)
        for weight, bias in ((parts.q, parts.q_bias), (parts.k, parts.k_bias), (parts.v, parts.v_bias))
    )
    if parts.q_norm is not None and parts.k_norm is not None:
        q, k = _normalise(q, parts.q_norm, parts), _normalise(k, parts.k_norm, parts)
    if parts.clip is not None:
        q, k, v = (t.clamp(-parts.clip, parts.clip) for t in (q, k, v))
    q, k, v = (t.view(len(x), -1, parts.head_dim) for t in (q, k, v))
    ops.rope(q, step.cos, step.sin, parts.interleaved)
    ops.rope(k, step.cos, step.sin, parts.interleaved)
    k_cache, v_cache = step.cache[parts.index]
    ops.store_kv(k_cache, k, step.slots)
    ops.store_kv(v_cache, v, step.slots)
    out = ops.attention(
        q,
        k_cache,
        v_cache,
        step.block_tables,
        step.seq_ids,
        step.positions,
        parts.scale,
        block_size=k_cache.shape[1],
    )
    attended = ops.linear(out.view(len(x), -1), parts.o, parts.o_bias)
    return ops.add_norm(attended, step.residual, parts.ffn_norm, parts.eps)


def _normalise(x: Tensor, weight: Tensor, parts: GQAParts) -> Tensor:
    rows = x.view(-1, parts.head_dim) if parts.qk_norm == "per_head" else x
    return ops.rms_norm(rows, weight, parts.eps).view_as(x)
