"""One layer's attention on a device, grouped-query or latent, with the norms around it.

Keys and values go to the paged cache first; then every run of rows gathers what it may see and attends to it with
torch's scaled_dot_product_attention. experts.kernels.gqa and .mla say the same for the CPU, step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from experts.kernels import GQAParts, MLAParts, Weight
from experts.kernels.reference import rms_norm, rope
from router.model.device.contexts import Context
from router.model.device.rows import Rows

# From slots [num_seqs, length] to keys [num_seqs, length, kv_heads, key_dim] and values [..., value_dim].
Read = Callable[[Tensor], tuple[Tensor, Tensor]]


class GQA:
    """Grouped-query attention. parts: on the device, none of few bits."""

    def __init__(self, parts: GQAParts) -> None:
        self._parts = parts

    def __call__(self, update: Tensor | None, rows: Rows) -> Tensor:
        """residual += update; residual += attention(norm(residual)); returns norm(residual), what the FFN takes."""
        parts, n = self._parts, len(rows.residual)
        x = add_norm(update, rows.residual, parts.attention_norm, parts.eps)
        q, k, v = (
            linear(x, weight, bias)
            for weight, bias in ((parts.q, parts.q_bias), (parts.k, parts.k_bias), (parts.v, parts.v_bias))
        )
        if parts.q_norm is not None and parts.k_norm is not None:
            q, k = self._normalise(q, parts.q_norm), self._normalise(k, parts.k_norm)
        if parts.clip is not None:
            q, k, v = (t.clamp(-parts.clip, parts.clip) for t in (q, k, v))
        q, k, v = (t.view(n, -1, parts.head_dim) for t in (q, k, v))
        rope(q, rows.cos, rows.sin, parts.interleaved)
        rope(k, rows.cos, rows.sin, parts.interleaved)
        keys, values = rows.cache[parts.index].flatten(1, 2)
        keys.index_copy_(0, rows.slots, k)
        values.index_copy_(0, rows.slots, v)
        out = attend(q, lambda slots: (keys[slots], values[slots]), rows.contexts, parts.scale)
        attended = linear(out.flatten(1), parts.o, parts.o_bias)
        return add_norm(attended, rows.residual, parts.ffn_norm, parts.eps)

    def _normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        heads = x.view(-1, self._parts.head_dim) if self._parts.qk_norm == "per_head" else x
        return rms_norm(heads, weight, self._parts.eps).view_as(x)


class MLA:
    """Latent attention in the absorbed form. parts: on the device, none of few bits."""

    def __init__(self, parts: MLAParts) -> None:
        self._uk, self._uv = _stacked(parts.uk), _stacked(parts.uv)
        self._parts = replace(parts, uk=self._uk.unbind(), uv=self._uv.unbind())

    def __call__(self, update: Tensor | None, rows: Rows) -> Tensor:
        """See GQA: the cache holds the normalised latent and the rotated shared key."""
        parts, n, rank = self._parts, len(rows.residual), self._parts.kv_lora_rank
        x = add_norm(update, rows.residual, parts.attention_norm, parts.eps)
        q = self._query(x).view(n, len(self._uk), -1)
        q_nope, q_pe = torch.split(q, [parts.nope_head_dim, parts.rope_head_dim], dim=-1)
        latent, k_pe = torch.split(linear(x, parts.kv_a, parts.kv_a_bias)[:, None], [rank, parts.rope_head_dim], dim=-1)
        latent = rms_norm(latent, parts.kv_a_norm, parts.latent_eps)
        rope(q_pe, rows.cos, rows.sin, parts.interleaved)
        rope(k_pe, rows.cos, rows.sin, parts.interleaved)
        cached = rows.cache[parts.index, 0].flatten(0, 1)
        cached.index_copy_(0, rows.slots, torch.cat((latent, k_pe), dim=-1))

        def read(slots: Tensor) -> tuple[Tensor, Tensor]:
            keys = cached[slots]
            return keys, keys[..., :rank]

        q = torch.cat((per_head(q_nope, self._uk), q_pe), dim=-1)
        out = per_head(attend(q, read, rows.contexts, parts.scale), self._uv)
        attended = linear(out.flatten(1), parts.o, parts.o_bias)
        return add_norm(attended, rows.residual, parts.ffn_norm, parts.eps)

    def _query(self, x: Tensor) -> Tensor:
        parts = self._parts
        if parts.q_a is None or parts.q_a_norm is None:
            return linear(x, parts.q_b)
        low = linear(x, parts.q_a, parts.q_a_bias)
        return linear(rms_norm(low, parts.q_a_norm, parts.latent_eps), parts.q_b)


def attend(q: Tensor, read: Read, contexts: list[Context], scale: float) -> Tensor:
    """Every row attends to its context. q: [num_rows, heads, key_dim]; query head h reads key head h // (heads /
    kv_heads). Returns [num_rows, heads, value_dim]."""
    return torch.cat([_attend(q[context.rows], read, context, scale) for context in contexts])


def _attend(q: Tensor, read: Read, context: Context, scale: float) -> Tensor:
    keys, values = (t.transpose(1, 2) for t in read(context.slots))  # [num_seqs, kv_heads, length, dim]
    num_seqs, kv_heads = keys.shape[:2]
    num_rows, heads = len(q) // num_seqs, q.shape[1]
    if num_rows == 1:
        # The query heads of a key head are as good as rows, so its keys are read once for all of them.
        q = q.view(num_seqs, kv_heads, heads // kv_heads, -1)
    else:
        q = q.view(num_seqs, num_rows, heads, -1).transpose(1, 2)
        keys, values = (_for_each(t, heads // kv_heads) for t in (keys, values))
    out = functional.scaled_dot_product_attention(q, keys, values, attn_mask=context.mask, scale=scale)
    return out.reshape(num_seqs, heads, -1) if num_rows == 1 else out.transpose(1, 2).flatten(0, 1)


def _for_each(heads: Tensor, group: int) -> Tensor:
    """[num_seqs, kv_heads, length, dim] -> [num_seqs, kv_heads * group, length, dim]; one head is not copied."""
    if heads.shape[1] == 1:
        return heads.expand(-1, group, -1, -1)
    return heads.repeat_interleave(group, dim=1)


def add_norm(update: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += update (or None), in place; its rms_norm. update, residual: [n, width]. Returns [n, width]."""
    if update is None:
        return rms_norm(residual, weight, eps)
    return rms_norm(update, weight, eps, residual=residual)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias in x's dtype. x: [..., in]; weight: [out, in]; bias: [out]."""
    assert isinstance(weight, Tensor)
    return functional.linear(x, weight, bias)


def per_head(x: Tensor, weights: Tensor) -> Tensor:
    """[n, heads, in] by a weight [out, in] for each head, [heads, out, in] -> [n, heads, out]."""
    return torch.bmm(x.transpose(0, 1), weights.transpose(1, 2)).transpose(0, 1)


def _stacked(weights: Sequence[Weight]) -> Tensor:
    """[heads, out, in] of a weight [out, in] for each head."""
    return torch.stack([weight for weight in weights if isinstance(weight, Tensor)])
