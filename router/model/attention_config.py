"""The attention's part of a config.json: heads and positions. Torch-free."""

from __future__ import annotations

import math
from typing import Literal

from barista.errors import CheckpointError
from router.model.config import ConfigReader
from router.model.spec import GQASpec, MLASpec, RopeSpec

# transformers' own where the file does not say.
_ROPE_DEFAULTS = {
    "rope_type": "default",
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
    "attention_factor": None,
    "mscale": 0.0,
    "mscale_all_dim": 0.0,
}


def gqa_spec(
    config: ConfigReader,
    *,
    qkv_bias: bool | None = None,
    out_bias: bool | None = None,
    qk_norm: Literal["none", "per_head", "full"] = "none",
    clip_qkv: float | None = None,
) -> GQASpec:
    """Grouped-query attention; a bias that is None here is the file's attention_bias."""
    heads = config.whole("num_attention_heads")
    kv_heads = config.whole_or_none("num_key_value_heads") or heads
    if heads % kv_heads:
        raise config.wrong("num_attention_heads", f"a multiple of num_key_value_heads = {kv_heads}")
    head_dim = config.whole_or_none("head_dim") or _divided(config, "hidden_size", heads)
    partial = _rope_reader(config).real("partial_rotary_factor")
    rotated = int(head_dim * min(partial, 1.0))
    if head_dim % 2 or rotated % 2 or not rotated or partial > 1:
        raise CheckpointError(
            f"{config.where}: RoPE cannot rotate pairs in {partial:g} of {head_dim} values a head.",
            "head_dim and its part that rotates (partial_rotary_factor) must be even.",
        )
    return GQASpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=_rope_spec(config, rotated),
        qkv_bias=config.flag("attention_bias") if qkv_bias is None else qkv_bias,
        out_bias=config.flag("attention_bias") if out_bias is None else out_bias,
        qk_norm=qk_norm,
        clip_qkv=clip_qkv,
    )


def _divided(config: ConfigReader, key: str, parts: int) -> int:
    size = config.whole(key)
    if size % parts:
        raise config.wrong(key, f"a multiple of {parts}")
    return size // parts


def mla_spec(config: ConfigReader) -> MLASpec:
    """Multi-head latent attention."""
    nope, rope_dim = config.whole("qk_nope_head_dim"), config.whole("qk_rope_head_dim")
    if rope_dim % 2:
        raise config.wrong("qk_rope_head_dim", "an even number")
    rope = _rope_spec(config, rope_dim, interleaved=config.flag("rope_interleave"))
    return MLASpec(
        num_heads=config.whole("num_attention_heads"),
        q_lora_rank=config.whole_or_none("q_lora_rank"),
        kv_lora_rank=config.whole("kv_lora_rank"),
        nope_head_dim=nope,
        rope_head_dim=rope_dim,
        v_head_dim=config.whole("v_head_dim"),
        scale=(nope + rope_dim) ** -0.5 * _attention_mscale(config, rope),
        rope=rope,
        bias=config.flag("attention_bias"),
    )


def max_position(config: ConfigReader) -> int:
    """A sliding window is exact full attention up to its width, so it bounds the length instead."""
    longest = config.whole("max_position_embeddings")
    window = config.whole_or_none("sliding_window") if config.flag("use_sliding_window") else None
    return min(longest, window or longest)


def _rope_reader(config: ConfigReader) -> ConfigReader:
    """The RoPE values: of `rope_parameters` (transformers 5), or of rope_theta and rope_scaling. Null is absent."""
    given = {key: config.raw(key) for key in ("rope_theta", "partial_rotary_factor")}
    given |= config.entries("rope_scaling") | config.entries("rope_parameters")
    if "type" in given:
        given.setdefault("rope_type", given["type"])
    defaults = _ROPE_DEFAULTS | {"original_max_position_embeddings": config.raw("max_position_embeddings")}
    return ConfigReader(given, defaults, f"{config.where}: RoPE")


def _rope_spec(config: ConfigReader, dim: int, *, interleaved: bool = False) -> RopeSpec:
    """dim: how many values of a head rotate."""
    given = _rope_reader(config)
    kind = given.one_of("rope_type", "default", "llama3", "yarn")
    theta = given.real("rope_theta", above=1.0)
    if kind == "default":
        return RopeSpec(theta=theta, dim=dim, interleaved=interleaved)
    original = given.whole("original_max_position_embeddings")
    if kind == "llama3":
        low = given.real("low_freq_factor")
        return RopeSpec(
            theta=theta,
            dim=dim,
            interleaved=interleaved,
            scaling="llama3",
            factor=given.real("factor"),
            original_max_len=original,
            low_freq_factor=low,
            high_freq_factor=given.real("high_freq_factor", above=low),
        )
    factor = given.real("factor") if given.has("factor") else config.whole("max_position_embeddings") / original
    return RopeSpec(
        theta=theta,
        dim=dim,
        interleaved=interleaved,
        scaling="yarn",
        factor=factor,
        original_max_len=original,
        beta_fast=given.real("beta_fast"),
        beta_slow=given.real("beta_slow"),
        truncate=given.flag("truncate"),
        cos_sin_scale=_cos_sin_scale(given, factor),
    )


def _attention_mscale(config: ConfigReader, rope: RopeSpec) -> float:
    """What DeepSeek's attention multiplies its scale with under YaRN: mscale_all_dim's square (its modeling code)."""
    all_dim = _mscale_of(_rope_reader(config), "mscale_all_dim")
    return _yarn_mscale(rope.factor, all_dim) ** 2 if rope.scaling != "none" and all_dim else 1.0


def _cos_sin_scale(given: ConfigReader, factor: float) -> float:
    scale = given.real_or_none("attention_factor")
    if scale is not None:
        return scale
    mscale, all_dim = _mscale_of(given, "mscale"), _mscale_of(given, "mscale_all_dim")
    if mscale and all_dim:
        return _yarn_mscale(factor, mscale) / _yarn_mscale(factor, all_dim)
    return _yarn_mscale(factor, 1.0)


def _mscale_of(given: ConfigReader, key: str) -> float:
    """0 is DeepSeek's way of writing none."""
    return given.real(key) if given.raw(key) != 0 else 0.0


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
