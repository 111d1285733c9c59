"""The two attentions over the paged cache: grouped-query, and multi-head latent in the absorbed form.

Both are prefill and decode alike: rows are written to the cache first, then every row attends to its own prefix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from experts import kernels
from router.model.batch import Batch
from router.model.spec import AttentionSpec, GQASpec, MLASpec

Load = Callable[[str], torch.Tensor]
CosSin = tuple[torch.Tensor, torch.Tensor]


def build_attention(spec: AttentionSpec, load: Load) -> GQAttention | MLAttention:
    """One layer's attention. load(name) gives a tensor of this layer's `self_attn`."""
    return GQAttention(spec, load) if isinstance(spec, GQASpec) else MLAttention(spec, load)


class GQAttention:
    """One layer's grouped-query attention."""

    def __init__(self, spec: GQASpec, load: Load) -> None:
        self.spec = spec
        self.q_weight, self.k_weight, self.v_weight = (load(f"{p}_proj.weight") for p in "qkv")
        self.o_weight = load("o_proj.weight")
        self.q_bias, self.k_bias, self.v_bias = (load(f"{p}_proj.bias") if spec.qkv_bias else None for p in "qkv")
        self.o_bias = load("o_proj.bias") if spec.out_bias else None
        self.q_norm, self.k_norm = (load(f"{p}_norm.weight") if spec.qk_norm != "none" else None for p in "qk")

    def __call__(self, x: torch.Tensor, cos_sin: CosSin, batch: Batch, cache: torch.Tensor, eps: float) -> torch.Tensor:
        """x: [num_tokens, hidden]; cache: [2, num_blocks, block_size, num_kv_heads, head_dim]."""
        spec, n = self.spec, len(x)
        q = kernels.linear(x, self.q_weight, self.q_bias)
        k = kernels.linear(x, self.k_weight, self.k_bias)
        v = kernels.linear(x, self.v_weight, self.v_bias)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._normalise(q, self.q_norm, eps), self._normalise(k, self.k_norm, eps)
        if spec.clip_qkv is not None:
            q, k, v = (t.clamp(-spec.clip_qkv, spec.clip_qkv) for t in (q, k, v))
        q, k, v = (t.view(n, -1, spec.head_dim) for t in (q, k, v))
        kernels.rope(q, *cos_sin, interleaved=spec.rope.interleaved)
        kernels.rope(k, *cos_sin, interleaved=spec.rope.interleaved)
        k_cache, v_cache = cache[0], cache[1]
        kernels.store_kv(k_cache, k, batch.slots)
        kernels.store_kv(v_cache, v, batch.slots)
        out = kernels.attention(
            q,
            k_cache,
            v_cache,
            batch.block_tables,
            batch.seq_ids,
            batch.positions,
            spec.scale,
            block_size=k_cache.shape[1],
        )
        return kernels.linear(out.view(n, -1), self.o_weight, self.o_bias)

    def _normalise(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows = x.view(-1, self.spec.head_dim) if self.spec.qk_norm == "per_head" else x
        return kernels.rms_norm(rows, weight, eps).view_as(x)


class MLAttention:
    """Multi-head latent attention, absorbed: W_UK goes into the query and W_UV into the output (arXiv 2405.04434, C).

    Every head then attends to one shared key of kv_lora_rank + rope_head_dim values, whose first kv_lora_rank are the
    value too.
    """

    def __init__(self, spec: MLASpec, load: Load) -> None:
        self.spec = spec
        self.q_a = self.q_a_norm = self.q_a_bias = None
        if spec.q_lora_rank is None:
            self.q_b = load("q_proj.weight")
        else:
            self.q_a, self.q_a_norm, self.q_b = (
                load("q_a_proj.weight"),
                load("q_a_layernorm.weight"),
                load("q_b_proj.weight"),
            )
            self.q_a_bias = load("q_a_proj.bias") if spec.bias else None
        self.kv_a, self.kv_a_norm = load("kv_a_proj_with_mqa.weight"), load("kv_a_layernorm.weight")
        self.kv_a_bias = load("kv_a_proj_with_mqa.bias") if spec.bias else None
        up = load("kv_b_proj.weight").view(spec.num_heads, spec.nope_head_dim + spec.v_head_dim, spec.kv_lora_rank)
        self.w_uk = up[:, : spec.nope_head_dim].transpose(1, 2).contiguous()  # [heads, kv_lora_rank, nope]
        self.w_uv = up[:, spec.nope_head_dim :].contiguous()  # [heads, v, kv_lora_rank]
        self.o_weight = load("o_proj.weight")
        self.o_bias = load("o_proj.bias") if spec.bias else None

    def __call__(self, x: torch.Tensor, cos_sin: CosSin, batch: Batch, cache: torch.Tensor, eps: float) -> torch.Tensor:
        """x: [num_tokens, hidden]; cache: [1, num_blocks, block_size, 1, kv_lora_rank + rope_head_dim]."""
        spec, n = self.spec, len(x)
        q = self._query(x).view(n, spec.num_heads, -1)
        q_nope, q_pe = q[..., : spec.nope_head_dim], q[..., spec.nope_head_dim :].contiguous()
        latent = kernels.linear(x, self.kv_a, self.kv_a_bias)
        c = kernels.rms_norm(latent[:, : spec.kv_lora_rank].contiguous(), self.kv_a_norm, spec.latent_eps)
        k_pe = latent[:, spec.kv_lora_rank :].contiguous().view(n, 1, -1)
        kernels.rope(q_pe, *cos_sin, interleaved=spec.rope.interleaved)
        kernels.rope(k_pe, *cos_sin, interleaved=spec.rope.interleaved)
        latent_cache = cache[0]
        kernels.store_kv(latent_cache, torch.cat((c[:, None], k_pe), dim=-1), batch.slots)
        query = torch.cat((_per_head(q_nope, self.w_uk), q_pe), dim=-1)
        out = kernels.attention(
            query,
            latent_cache,
            latent_cache[..., : spec.kv_lora_rank],
            batch.block_tables,
            batch.seq_ids,
            batch.positions,
            spec.scale,
            block_size=latent_cache.shape[1],
        )
        return kernels.linear(_per_head(out, self.w_uv).view(n, -1), self.o_weight, self.o_bias)

    def _query(self, x: torch.Tensor) -> torch.Tensor:
        if self.q_a is None or self.q_a_norm is None:
            return kernels.linear(x, self.q_b)
        low = kernels.linear(x, self.q_a, self.q_a_bias)
        return kernels.linear(kernels.rms_norm(low, self.q_a_norm, self.spec.latent_eps), self.q_b)


def _per_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[n, heads, in] by [heads, out, in] -> [n, heads, out], each head by the row-invariant product."""
    out = x.new_empty(len(x), weight.shape[0], weight.shape[1])
    for head in range(weight.shape[0]):
        out[:, head] = kernels.linear(x[:, head].contiguous(), weight[head])
    return out
