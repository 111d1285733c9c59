"""The families that Barista runs: one table entry each, from a Hugging Face config.json to a ModelSpec. Torch-free.

Missing keys take the defaults of transformers' configuration class of the same family, as they do there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from barista.errors import CheckpointError
from experts.spec import FFNSpec, GateSpec
from router.model.spec import (
    AttentionSpec,
    DenseFFNSpec,
    GQASpec,
    MLASpec,
    ModelSpec,
    MoESpec,
    RopeSpec,
)

Config = Mapping[str, Any]
Layers = tuple[DenseFFNSpec | MoESpec, ...]


def model_spec(config: Config) -> ModelSpec:
    """The spec of a checkpoint from its config.json.

    Raises CheckpointError: the architecture is unknown (the message lists the known ones), a value is missing, or the
    configuration asks for something that the family's entry does not cover.
    """
    names = config.get("architectures") or []
    name = names[0] if names else config.get("model_type", "none given")
    family = FAMILIES.get(name)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"Unknown architecture {name!r}.", f"Barista runs: {known}.")
    try:
        return family(config, name)
    except KeyError as missing:
        raise CheckpointError(
            f"config.json of a {name} lacks the key {missing}.", "Use a complete checkpoint."
        ) from None


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _require(config: Config, name: str, key: str, supported: Any) -> None:
    """Refuse a configuration value that this family's entry does not compute."""
    if key in config and config[key] is not None and config[key] != supported:
        raise CheckpointError(
            f"{name} with {key} = {config[key]!r} is not supported.", f"Only {key} = {supported!r} is."
        )


# ---------------------------------------------------------------- positions


def _rope(config: Config, dim: int, *, theta: float = 10000.0, interleaved: bool = False) -> RopeSpec:
    """RopeSpec from rope_parameters (transformers 5), or from rope_theta and rope_scaling (older files)."""
    given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(given.get("rope_theta") or config.get("rope_theta") or theta)
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return RopeSpec(theta=theta, dim=dim, interleaved=interleaved)
    original = int(given.get("original_max_position_embeddings") or config["max_position_embeddings"])
    if kind == "llama3":
        return RopeSpec(
            theta=theta,
            dim=dim,
            interleaved=interleaved,
            scaling="llama3",
            factor=float(given["factor"]),
            original_max_len=original,
            low_freq_factor=float(given["low_freq_factor"]),
            high_freq_factor=float(given["high_freq_factor"]),
        )
    if kind == "yarn":
        factor = float(given.get("factor") or config["max_position_embeddings"] / original)
        return RopeSpec(
            theta=theta,
            dim=dim,
            interleaved=interleaved,
            scaling="yarn",
            factor=factor,
            original_max_len=original,
            beta_fast=float(given.get("beta_fast") or 32),
            beta_slow=float(given.get("beta_slow") or 1),
            truncate=bool(given.get("truncate", True)),
            cos_sin_scale=_yarn_cos_sin_scale(given, factor),
        )
    raise CheckpointError(f"RoPE scaling {kind!r} is not supported.", "Supported: default, llama3, yarn.")


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_cos_sin_scale(given: Mapping[str, Any], factor: float) -> float:
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
    if mscale and all_dim:
        return _yarn_mscale(factor, mscale) / _yarn_mscale(factor, all_dim)
    return _yarn_mscale(factor, 1.0)


def _max_position(config: Config) -> int:
    """A sliding window is exact full attention up to its width, so it bounds the length instead."""
    longest = int(config["max_position_embeddings"])
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return min(longest, int(window)) if window else longest


# ---------------------------------------------------------------- attention


def _gqa(
    config: Config,
    *,
    qkv_bias: bool | None = None,
    out_bias: bool | None = None,
    qk_norm: Literal["none", "per_head", "full"] = "none",
    head_dim: int | None = None,
    theta: float = 10000.0,
    clip_qkv: float | None = None,
) -> GQASpec:
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or head_dim or config["hidden_size"] // heads)
    given = config.get("rope_parameters") or {}
    partial = float(given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    bias = bool(config.get("attention_bias", False))
    return GQASpec(
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=_rope(config, int(head_dim * partial), theta=theta),
        qkv_bias=bias if qkv_bias is None else qkv_bias,
        out_bias=bias if out_bias is None else out_bias,
        qk_norm=qk_norm,
        clip_qkv=clip_qkv,
    )


def _mla(config: Config) -> MLASpec:
    nope, rope_dim = int(config.get("qk_nope_head_dim", 128)), int(config.get("qk_rope_head_dim", 64))
    given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope = _rope(config, rope_dim, interleaved=bool(config.get("rope_interleave", True)))
    scale = (nope + rope_dim) ** -0.5
    if rope.scaling != "none" and given.get("mscale_all_dim"):
        scale *= _yarn_mscale(rope.factor, float(given["mscale_all_dim"])) ** 2
    rank = config.get("q_lora_rank", 1536)
    return MLASpec(
        num_heads=int(config["num_attention_heads"]),
        q_lora_rank=None if rank is None else int(rank),
        kv_lora_rank=int(config.get("kv_lora_rank", 512)),
        nope_head_dim=nope,
        rope_head_dim=rope_dim,
        v_head_dim=int(config.get("v_head_dim", 128)),
        scale=scale,
        rope=rope,
        bias=bool(config.get("attention_bias", False)),
    )


# ---------------------------------------------------------------- the FFNs


def _experts(config: Config, num_experts: int, intermediate: int, **names: str) -> FFNSpec:
    return FFNSpec(
        hidden_size=int(config["hidden_size"]), intermediate_size=intermediate, num_experts=num_experts, **names
    )


def _deepseek_layers(config: Config, gate: GateSpec, *, first_dense: int, shared: int, moe_size: int) -> Layers:
    """The first layers dense, the rest MoE with shared experts fused into one FFN."""
    moe = MoESpec(
        gate=gate, experts=_experts(config, gate.num_experts, moe_size), shared_intermediate_size=shared * moe_size
    )
    dense = DenseFFNSpec(intermediate_size=int(config["intermediate_size"]))
    return tuple(dense if i < first_dense else moe for i in range(int(config["num_hidden_layers"])))


def _noaux_tc(config: Config, num_experts: int, top_k: int, groups: int, topk_groups: int, scale: float) -> GateSpec:
    """The gate of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2), also of Kimi-K2 and GLM-4.5."""
    return GateSpec(
        num_experts=num_experts,
        top_k=top_k,
        score="sigmoid",
        float32_logits=True,
        float32_weights=True,
        select_bias=True,
        num_groups=groups,
        topk_groups=topk_groups,
        group_score="top2sum",
        normalise=bool(config.get("norm_topk_prob", True)),
        norm_eps=1e-20,
        scale=scale,
    )


def _deepseek_v3(config: Config, name: str) -> ModelSpec:
    _require(config, name, "scoring_func", "sigmoid")
    _require(config, name, "topk_method", "noaux_tc")
    _require(config, name, "moe_layer_freq", 1)
    gate = _noaux_tc(
        config,
        int(config.get("n_routed_experts", 256)),
        int(config.get("num_experts_per_tok", 8)),
        int(_or(config.get("n_group"), 8)),
        int(_or(config.get("topk_group"), 4)),
        float(config.get("routed_scaling_factor", 2.5)),
    )
    layers = _deepseek_layers(
        config,
        gate,
        first_dense=int(config.get("first_k_dense_replace", 3)),
        shared=int(config.get("n_shared_experts") or 0),
        moe_size=int(config.get("moe_intermediate_size", 2048)),
    )
    return _model(config, name, _mla(config), layers, extra=_mtp_layers(config))


def _deepseek_v2(config: Config, name: str) -> ModelSpec:
    _require(config, name, "scoring_func", "softmax")
    _require(config, name, "norm_topk_prob", False)
    _require(config, name, "moe_layer_freq", 1)
    method = config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise CheckpointError(
            f"{name} with topk_method = {method!r} is not supported.", "greedy and group_limited_greedy are."
        )
    grouped = method == "group_limited_greedy"
    gate = GateSpec(
        num_experts=int(config.get("n_routed_experts", 64)),
        top_k=int(config["num_experts_per_tok"]),
        score="softmax",
        float32_logits=True,
        float32_weights=True,
        num_groups=int(config["n_group"]) if grouped else 1,
        topk_groups=int(config["topk_group"]) if grouped else 1,
        group_score="max",
        masked_value=0.0,
        scale=float(config.get("routed_scaling_factor", 1.0)),
    )
    layers = _deepseek_layers(
        config,
        gate,
        first_dense=int(config.get("first_k_dense_replace", 0)),
        shared=int(config.get("n_shared_experts") or 0),
        moe_size=int(config.get("moe_intermediate_size", 1407)),
    )
    return _model(config, name, _mla(config), layers)


def _glm4_moe(config: Config, name: str) -> ModelSpec:
    gate = _noaux_tc(
        config,
        int(config.get("n_routed_experts", 128)),
        int(config.get("num_experts_per_tok", 8)),
        int(config.get("n_group", 1)),
        int(config.get("topk_group", 1)),
        float(config.get("routed_scaling_factor", 1.0)),
    )
    layers = _deepseek_layers(
        config,
        gate,
        first_dense=int(config.get("first_k_dense_replace", 1)),
        shared=int(config.get("n_shared_experts") or 0),
        moe_size=int(config.get("moe_intermediate_size", 1408)),
    )
    attention = _gqa(config, out_bias=False, qk_norm="per_head" if config.get("use_qk_norm") else "none")
    return _model(config, name, attention, layers, extra=_mtp_layers(config))


def _softmax_gate(config: Config, num_experts: int, *, normalise: bool, float32_weights: bool) -> GateSpec:
    return GateSpec(
        num_experts=num_experts,
        top_k=int(config["num_experts_per_tok"]),
        score="softmax",
        float32_logits=False,
        float32_weights=float32_weights,
        normalise=normalise,
    )


def _qwen3_moe(config: Config, name: str) -> ModelSpec:
    num_experts = int(config.get("num_experts") or config["num_local_experts"])
    moe = MoESpec(
        gate=_softmax_gate(
            config, num_experts, normalise=bool(config.get("norm_topk_prob", False)), float32_weights=False
        ),
        experts=_experts(config, num_experts, int(config["moe_intermediate_size"])),
    )
    dense = DenseFFNSpec(intermediate_size=int(config["intermediate_size"]))
    only_dense, every = set(config.get("mlp_only_layers") or ()), int(config.get("decoder_sparse_step", 1))
    layers = tuple(
        moe if i not in only_dense and (i + 1) % every == 0 else dense for i in range(int(config["num_hidden_layers"]))
    )
    return _model(config, name, _gqa(config, qk_norm="per_head"), layers)


def _mixtral(config: Config, name: str) -> ModelSpec:
    num_experts = int(config.get("num_local_experts", 8))
    prefix = "model.layers.{layer}.block_sparse_moe."
    moe = MoESpec(
        gate=_softmax_gate(config, num_experts, normalise=True, float32_weights=True),
        experts=_experts(
            config,
            num_experts,
            int(config["intermediate_size"]),
            gate_name=prefix + "experts.{expert}.w1.weight",
            up_name=prefix + "experts.{expert}.w3.weight",
            down_name=prefix + "experts.{expert}.w2.weight",
        ),
        gate_name=prefix + "gate.weight",
    )
    return _model(config, name, _gqa(config, theta=1e6), (moe,) * int(config["num_hidden_layers"]))


def _olmoe(config: Config, name: str) -> ModelSpec:
    num_experts = int(config.get("num_experts", 64))
    gate = _softmax_gate(
        config, num_experts, normalise=bool(config.get("norm_topk_prob", False)), float32_weights=False
    )
    moe = MoESpec(gate=gate, experts=_experts(config, num_experts, int(config["intermediate_size"])))
    attention = _gqa(config, qk_norm="full", clip_qkv=config.get("clip_qkv"))
    return _model(config, name, attention, (moe,) * int(config["num_hidden_layers"]))


def _dense(attention: Callable[[Config], GQASpec]) -> Callable[[Config, str], ModelSpec]:
    def build(config: Config, name: str) -> ModelSpec:
        _require(config, name, "mlp_bias", False)
        ffn = DenseFFNSpec(intermediate_size=int(config["intermediate_size"]))
        return _model(config, name, attention(config), (ffn,) * int(config["num_hidden_layers"]))

    return build


# ---------------------------------------------------------------- the whole model


def _mtp_layers(config: Config) -> int:
    return int(config.get("num_nextn_predict_layers") or config.get("num_mtp_layers") or 0)


def _model(config: Config, name: str, attention: AttentionSpec, layers: Layers, *, extra: int = 0) -> ModelSpec:
    _require(config, name, "hidden_act", "silu")
    for layer in layers:
        if isinstance(layer, MoESpec):
            _check_gate(layer.gate, name)
    return ModelSpec(
        family=name,
        vocab_size=int(config["vocab_size"]),
        hidden_size=int(config["hidden_size"]),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_position=_max_position(config),
        attention=attention,
        layers=layers,
        num_extra_layers=extra,
    )


def _check_gate(gate: GateSpec, name: str) -> None:
    selectable = gate.num_experts // gate.num_groups * gate.topk_groups
    if gate.num_experts % gate.num_groups or gate.topk_groups > gate.num_groups or not 0 < gate.top_k <= selectable:
        raise CheckpointError(
            f"{name}: {gate.num_experts} experts in {gate.num_groups} groups, of which {gate.topk_groups} are kept, "
            f"cannot give the top {gate.top_k}.",
            "num_experts_per_tok must be at least 1 and at most topk_group * n_routed_experts / n_group.",
        )


FAMILIES: dict[str, Callable[[Config, str], ModelSpec]] = {
    "DeepseekV2ForCausalLM": _deepseek_v2,
    "DeepseekV3ForCausalLM": _deepseek_v3,
    "KimiK2ForCausalLM": _deepseek_v3,
    "Glm4MoeForCausalLM": _glm4_moe,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "MixtralForCausalLM": _mixtral,
    "OlmoeForCausalLM": _olmoe,
    "LlamaForCausalLM": _dense(_gqa),
    "Qwen2ForCausalLM": _dense(lambda config: _gqa(config, qkv_bias=True, out_bias=False)),
    "Qwen3ForCausalLM": _dense(lambda config: _gqa(config, qk_norm="per_head", head_dim=128)),
}
