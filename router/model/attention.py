"""From a spec and a checkpoint's tensors to one layer's attention: grouped-query, or multi-head latent.

Both are prefill and decode alike: rows are written to the cache first, then every row attends to its own prefix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from experts import kernels
from router.model.spec import GQASpec, MLASpec, ModelSpec

Load = Callable[[str], torch.Tensor]
AttentionLayer = kernels.GQALayer | kernels.MLALayer
AttentionParts = kernels.GQAParts | kernels.MLAParts


def build_attention(spec: ModelSpec, index: int, load: Load) -> AttentionLayer:
    """One layer's attention with its norms, of the CPU's kernels. load(name) gives a tensor of this layer."""
    parts = attention_parts(spec, index, load)
    return kernels.GQALayer(parts) if isinstance(parts, kernels.GQAParts) else kernels.MLALayer(parts)


def attention_parts(spec: ModelSpec, index: int, load: Load) -> AttentionParts:
    """The weights and constants of one layer's attention, wherever it is computed."""
    if isinstance(spec.attention, GQASpec):
        return _gqa_parts(spec.attention, spec.rms_norm_eps, index, load)
    return _mla_parts(spec.attention, spec.rms_norm_eps, index, load)


def _gqa_parts(spec: GQASpec, eps: float, index: int, load: Load) -> kernels.GQAParts:
    q_bias, k_bias, v_bias = (load(f"self_attn.{p}_proj.bias") if spec.qkv_bias else None for p in "qkv")
    q_norm, k_norm = (load(f"self_attn.{p}_norm.weight") if spec.qk_norm != "none" else None for p in "qk")
    q, k, v, o = (load(f"self_attn.{p}_proj.weight") for p in "qkvo")
    return kernels.GQAParts(
        index=index,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        scale=spec.scale,
        eps=eps,
        interleaved=spec.rope.interleaved,
        qk_norm=spec.qk_norm,
        clip=spec.clip_qkv,
        attention_norm=load("input_layernorm.weight"),
        ffn_norm=load("post_attention_layernorm.weight"),
        q=q,
        k=k,
        v=v,
        o=o,
        q_bias=q_bias,
        k_bias=k_bias,
        v_bias=v_bias,
        o_bias=load("self_attn.o_proj.bias") if spec.out_bias else None,
        q_norm=q_norm,
        k_norm=k_norm,
    )


def _mla_parts(spec: MLASpec, eps: float, index: int, load: Load) -> kernels.MLAParts:
    low = spec.q_lora_rank is not None
    up = load("self_attn.kv_b_proj.weight").view(spec.num_heads, -1, spec.kv_lora_rank)
    uk = up[:, : spec.nope_head_dim].transpose(1, 2).contiguous()  # [heads, kv_lora_rank, nope]
    uv = up[:, spec.nope_head_dim :].contiguous()  # [heads, v, kv_lora_rank]
    return kernels.MLAParts(
        index=index,
        kv_lora_rank=spec.kv_lora_rank,
        nope_head_dim=spec.nope_head_dim,
        rope_head_dim=spec.rope_head_dim,
        v_head_dim=spec.v_head_dim,
        scale=spec.scale,
        eps=eps,
        latent_eps=spec.latent_eps,
        interleaved=spec.rope.interleaved,
        attention_norm=load("input_layernorm.weight"),
        ffn_norm=load("post_attention_layernorm.weight"),
        q_a=load("self_attn.q_a_proj.weight") if low else None,
        q_b=load("self_attn.q_b_proj.weight" if low else "self_attn.q_proj.weight"),
        kv_a=load("self_attn.kv_a_proj_with_mqa.weight"),
        uk=uk.unbind(),
        uv=uv.unbind(),
        o=load("self_attn.o_proj.weight"),
        kv_a_norm=load("self_attn.kv_a_layernorm.weight"),
        q_a_norm=load("self_attn.q_a_layernorm.weight") if low else None,
        q_a_bias=load("self_attn.q_a_proj.bias") if low and spec.bias else None,
        kv_a_bias=load("self_attn.kv_a_proj_with_mqa.bias") if spec.bias else None,
        o_bias=load("self_attn.o_proj.bias") if spec.bias else None,
    )
