"""One layer's multi-head latent attention with the norms around it, in one call.

It runs absorbed: W_UK goes into the query and W_UV into the output (DeepSeek-V2, arXiv 2405.04434, appendix C). Every
head then attends to one shared key of kv_lora_rank + rope_head_dim values, whose first kv_lora_rank are the value too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.kernels import ops
from experts.kernels.library import current
from experts.kernels.step_rows import StepRows
from experts.kernels.structs import NormsStruct, WeightStruct, norms_struct, pointer, weight_struct, weight_structs
from experts.kernels.weight import Weight

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _MLAStruct(ctypes.Structure):
    """bk_mla of src/barista_kernels.h."""

    _fields_ = (
        ("size", _L),
        ("norms", NormsStruct),
        ("q_a", WeightStruct),
        ("q_b", WeightStruct),
        ("kv_a", WeightStruct),
        ("o", WeightStruct),
        ("uk", _P),
        ("uv", _P),
        ("q_a_norm", _P),
        ("kv_a_norm", _P),
        ("q_a_bias", _P),
        ("kv_a_bias", _P),
        ("o_bias", _P),
        ("index", _L),
        ("num_heads", _L),
        ("kv_lora_rank", _L),
        ("nope_head_dim", _L),
        ("rope_head_dim", _L),
        ("v_head_dim", _L),
        ("scale", _F),
        ("latent_eps", _F),
        ("interleaved", _I),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MLAParts:
    """Layer `index`'s weights and constants. All rows and plain tensors but weights have attention_norm's dtype.

    q_a: [q_lora_rank, hidden], or None where q_b takes the hidden states; q_b: [num_heads * (nope + rope), its input];
    kv_a: [kv_lora_rank + rope, hidden]; uk: [kv_lora_rank, nope] and uv: [v, kv_lora_rank] for each head;
    o: [hidden, num_heads * v]; biases: [their weight's out]; q_a_norm: [q_lora_rank]; kv_a_norm: [kv_lora_rank];
    attention_norm, ffn_norm: [hidden]. interleaved: of the rotation (kernels.rope).
    """

    index: int
    kv_lora_rank: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int
    scale: float
    eps: float
    latent_eps: float
    interleaved: bool
    attention_norm: Tensor
    ffn_norm: Tensor
    q_a: Weight | None
    q_b: Weight
    kv_a: Weight
    uk: Sequence[Weight]
    uv: Sequence[Weight]
    o: Weight
    kv_a_norm: Tensor
    q_a_norm: Tensor | None = None
    q_a_bias: Tensor | None = None
    kv_a_bias: Tensor | None = None
    o_bias: Tensor | None = None


class MLALayer:
    """Call it in every step."""

    def __init__(self, parts: MLAParts) -> None:
        self._parts = parts
        dtype = parts.attention_norm.dtype
        self._heads = weight_structs(parts.uk, dtype), weight_structs(parts.uv, dtype)
        uk, uv = (ctypes.addressof(heads) for heads in self._heads)
        self._struct = _MLAStruct(
            size=ctypes.sizeof(_MLAStruct),
            norms=norms_struct(parts.attention_norm, parts.ffn_norm, parts.eps),
            **{name: weight_struct(getattr(parts, name), dtype) for name in ("q_a", "q_b", "kv_a", "o")},
            uk=uk,
            uv=uv,
            q_a_norm=pointer(parts.q_a_norm),
            kv_a_norm=pointer(parts.kv_a_norm),
            q_a_bias=pointer(parts.q_a_bias),
            kv_a_bias=pointer(parts.kv_a_bias),
            o_bias=pointer(parts.o_bias),
            index=parts.index,
            num_heads=len(parts.uk),
            kv_lora_rank=parts.kv_lora_rank,
            nope_head_dim=parts.nope_head_dim,
            rope_head_dim=parts.rope_head_dim,
            v_head_dim=parts.v_head_dim,
            scale=parts.scale,
            latent_eps=parts.latent_eps,
            interleaved=parts.interleaved,
        )
        self.address = ctypes.addressof(self._struct)

    def __call__(self, update: Tensor | None, step: StepRows) -> Tensor:
        """See GQALayer: the cache holds the normalised latent and the rotated shared key."""
        functions = current()
        if functions is None:
            return mla_in_steps(self._parts, update, step)
        x = step.empty_rows()
        status = functions.bk_mla_layer(self.address, step.address, pointer(update), x.data_ptr())
        assert status == 0
        return x


def mla_in_steps(parts: MLAParts, update: Tensor | None, step: StepRows) -> Tensor:
    """The same, to the byte, one kernel after another: what MLALayer means."""
    x = ops.add_norm(update, step.residual, parts.attention_norm, parts.eps)
    n, heads, rank = len(x), len(parts.uk), parts.kv_lora_rank
    q = _query(parts, x).view(n, heads, -1)
    q_nope, q_pe = q[..., : parts.nope_head_dim], q[..., parts.nope_head_dim :].contiguous()
    latent = ops.linear(x, parts.kv_a, parts.kv_a_bias)
    c = ops.rms_norm(latent[:, :rank].contiguous(), parts.kv_a_norm, parts.latent_eps)
    k_pe = latent[:, rank:].contiguous().view(n, 1, -1)
    ops.rope(q_pe, step.cos, step.sin, parts.interleaved)
    ops.rope(k_pe, step.cos, step.sin, parts.interleaved)
    latent_cache = step.cache[parts.index, 0]
    ops.store_kv(latent_cache, torch.cat((c[:, None], k_pe), dim=-1), step.slots)
    out = ops.attention(
        torch.cat((_per_head(q_nope, parts.uk), q_pe), dim=-1),
        latent_cache,
        latent_cache[..., :rank],
        step.block_tables,
        step.seq_ids,
        step.positions,
        parts.scale,
        block_size=latent_cache.shape[1],
    )
    attended = ops.linear(_per_head(out, parts.uv).view(n, -1), parts.o, parts.o_bias)
    return ops.add_norm(attended, step.residual, parts.ffn_norm, parts.eps)


def _query(parts: MLAParts, x: Tensor) -> Tensor:
    if parts.q_a is None or parts.q_a_norm is None:
        return ops.linear(x, parts.q_b)
    low = ops.linear(x, parts.q_a, parts.q_a_bias)
    return ops.linear(ops.rms_norm(low, parts.q_a_norm, parts.latent_eps), parts.q_b)


def _per_head(x: Tensor, weights: Sequence[Weight]) -> Tensor:
    """[n, heads, in] by a weight [out, in] for each head -> [n, heads, out]."""
    return torch.stack([ops.linear(x[:, head].contiguous(), weight) for head, weight in enumerate(weights)], dim=1)
