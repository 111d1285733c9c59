"""The families that Barista runs: one table entry each, from a Hugging Face config.json to a ModelSpec. Torch-free.

Missing keys take the defaults of transformers' configuration class of the same family, as they do there; only the sizes
that every published config.json states (vocab_size, hidden_size, ...) have none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from barista.errors import CheckpointError
from experts.spec import FFNSpec, GateSpec
from router.model.attention_config import gqa_spec, max_position, mla_spec
from router.model.config import ConfigReader
from router.model.spec import AttentionSpec, DenseFFNSpec, GQASpec, ModelSpec, MoESpec

Layers = tuple[DenseFFNSpec | MoESpec, ...]

# Above every published model, and few enough that a table of all names is built in a second.
MAX_LAYERS = 10_000
MAX_EXPERTS_PER_LAYER = 100_000
MAX_EXPERTS = 200_000


@dataclass(frozen=True, slots=True)
class Family:
    """build: from the configuration to the spec. defaults: of the keys that a config.json may leave out."""

    build: Callable[[ConfigReader, str], ModelSpec]
    defaults: Mapping[str, Any]


def model_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a checkpoint from its config.json.

    Raises CheckpointError: the architecture is unknown (the message lists the known ones), a value is missing or not
    possible, or the configuration asks for something that the family's entry does not cover.
    """
    name = _architecture(ConfigReader(config, {"architectures": None, "model_type": "none given"}, "config.json"))
    family = FAMILIES.get(name)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"Unknown architecture {name!r}.", f"Barista runs: {known}.")
    return family.build(ConfigReader(config, family.defaults, f"config.json of a {name}"), name)


def _architecture(config: ConfigReader) -> str:
    names = config.raw("architectures") or [config.raw("model_type")]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise config.wrong("architectures", 'a list with one name, such as ["LlamaForCausalLM"]')
    return names[0]


# ---------------------------------------------------------------- the FFNs


def _num_layers(config: ConfigReader) -> int:
    return config.whole("num_hidden_layers", most=MAX_LAYERS)


def _num_experts(config: ConfigReader, *keys: str) -> int:
    return config.whole(*keys, most=MAX_EXPERTS_PER_LAYER)


def _experts(config: ConfigReader, num_experts: int, size_key: str, **names: str) -> FFNSpec:
    return FFNSpec(
        hidden_size=config.whole("hidden_size"),
        intermediate_size=config.whole(size_key),
        num_experts=num_experts,
        **names,
    )


def _dense_ffn(config: ConfigReader) -> DenseFFNSpec:
    return DenseFFNSpec(intermediate_size=config.whole("intermediate_size"))


def _deepseek_layers(config: ConfigReader, gate: GateSpec) -> Layers:
    """The first layers dense, the rest MoE with shared experts fused into one FFN."""
    experts = _experts(config, gate.num_experts, "moe_intermediate_size")
    # DeepSeek's own files write null for none.
    shared = config.whole("n_shared_experts", least=0) if config.raw("n_shared_experts") is not None else 0
    moe = MoESpec(gate=gate, experts=experts, shared_intermediate_size=shared * experts.intermediate_size)
    dense, num_dense = _dense_ffn(config), config.whole("first_k_dense_replace", least=0)
    return tuple(dense if i < num_dense else moe for i in range(_num_layers(config)))


def _noaux_tc(config: ConfigReader) -> GateSpec:
    """The gate of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2), also of Kimi-K2 and GLM-4.5."""
    return GateSpec(
        num_experts=_num_experts(config, "n_routed_experts", "num_local_experts"),
        top_k=config.whole("num_experts_per_tok"),
        score="sigmoid",
        float32_logits=True,
        float32_weights=True,
        select_bias=True,
        num_groups=config.whole("n_group"),
        topk_groups=config.whole("topk_group"),
        group_score="top2sum",
        normalise=config.flag("norm_topk_prob"),
        norm_eps=1e-20,
        scale=config.real("routed_scaling_factor"),
    )


def _deepseek_v3(config: ConfigReader, name: str) -> ModelSpec:
    config.require("scoring_func", "sigmoid")
    config.require("topk_method", "noaux_tc")
    config.require("moe_layer_freq", 1)
    layers = _deepseek_layers(config, _noaux_tc(config))
    return _model(config, name, mla_spec(config), layers, extra=_mtp_layers(config))


def _deepseek_v2(config: ConfigReader, name: str) -> ModelSpec:
    config.require("scoring_func", "softmax")
    config.require("norm_topk_prob", False)
    config.require("moe_layer_freq", 1)
    grouped = config.one_of("topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy"
    gate = GateSpec(
        num_experts=_num_experts(config, "n_routed_experts", "num_experts"),
        top_k=config.whole("num_experts_per_tok"),
        score="softmax",
        float32_logits=True,
        float32_weights=True,
        num_groups=config.whole("n_group") if grouped else 1,
        topk_groups=config.whole("topk_group") if grouped else 1,
        group_score="max",
        masked_value=0.0,
        scale=config.real("routed_scaling_factor"),
    )
    return _model(config, name, mla_spec(config), _deepseek_layers(config, gate))


def _glm4_moe(config: ConfigReader, name: str) -> ModelSpec:
    attention = gqa_spec(config, out_bias=False, qk_norm="per_head" if config.flag("use_qk_norm") else "none")
    layers = _deepseek_layers(config, _noaux_tc(config))
    return _model(config, name, attention, layers, extra=_mtp_layers(config))


def _softmax_gate(config: ConfigReader, num_experts: int, *, normalise: bool, float32_weights: bool) -> GateSpec:
    return GateSpec(
        num_experts=num_experts,
        top_k=config.whole("num_experts_per_tok"),
        score="softmax",
        float32_logits=False,
        float32_weights=float32_weights,
        normalise=normalise,
    )


def _qwen3_moe(config: ConfigReader, name: str) -> ModelSpec:
    num_experts = _num_experts(config, "num_experts", "num_local_experts")
    moe = MoESpec(
        gate=_softmax_gate(config, num_experts, normalise=config.flag("norm_topk_prob"), float32_weights=False),
        experts=_experts(config, num_experts, "moe_intermediate_size"),
    )
    dense, only_dense, every = (
        _dense_ffn(config),
        config.indices("mlp_only_layers"),
        config.whole("decoder_sparse_step"),
    )
    layers = tuple(moe if i not in only_dense and (i + 1) % every == 0 else dense for i in range(_num_layers(config)))
    return _model(config, name, gqa_spec(config, qk_norm="per_head"), layers)


def _mixtral(config: ConfigReader, name: str) -> ModelSpec:
    num_experts = _num_experts(config, "num_local_experts", "num_experts")
    prefix = "model.layers.{layer}.block_sparse_moe."
    moe = MoESpec(
        gate=_softmax_gate(config, num_experts, normalise=True, float32_weights=True),
        experts=_experts(
            config,
            num_experts,
            "intermediate_size",
            gate_name=prefix + "experts.{expert}.w1.weight",
            up_name=prefix + "experts.{expert}.w3.weight",
            down_name=prefix + "experts.{expert}.w2.weight",
        ),
        gate_name=prefix + "gate.weight",
    )
    attention = gqa_spec(config, qkv_bias=False, out_bias=False)
    return _model(config, name, attention, (moe,) * _num_layers(config))


def _olmoe(config: ConfigReader, name: str) -> ModelSpec:
    num_experts = _num_experts(config, "num_experts", "num_local_experts")
    gate = _softmax_gate(config, num_experts, normalise=config.flag("norm_topk_prob"), float32_weights=False)
    moe = MoESpec(gate=gate, experts=_experts(config, num_experts, "intermediate_size"))
    attention = gqa_spec(config, qk_norm="full", clip_qkv=config.real_or_none("clip_qkv"))
    return _model(config, name, attention, (moe,) * _num_layers(config))


def _llama(config: ConfigReader, name: str) -> ModelSpec:
    return _dense(config, name, gqa_spec(config))


def _qwen2(config: ConfigReader, name: str) -> ModelSpec:
    return _dense(config, name, gqa_spec(config, qkv_bias=True, out_bias=False))


def _qwen3(config: ConfigReader, name: str) -> ModelSpec:
    return _dense(config, name, gqa_spec(config, qk_norm="per_head"))


def _dense(config: ConfigReader, name: str, attention: GQASpec) -> ModelSpec:
    config.require("mlp_bias", False)
    return _model(config, name, attention, (_dense_ffn(config),) * _num_layers(config))


# ---------------------------------------------------------------- the whole model


def _mtp_layers(config: ConfigReader) -> int:
    return config.whole("num_mtp_layers", "num_nextn_predict_layers", least=0, most=100)


def _model(config: ConfigReader, name: str, attention: AttentionSpec, layers: Layers, *, extra: int = 0) -> ModelSpec:
    config.require("hidden_act", "silu")
    _check_experts(config, [layer.gate for layer in layers if isinstance(layer, MoESpec)])
    return ModelSpec(
        family=name,
        vocab_size=config.whole("vocab_size"),
        hidden_size=config.whole("hidden_size"),
        rms_norm_eps=config.real("rms_norm_eps"),
        tied_embeddings=config.flag("tie_word_embeddings"),
        max_position=max_position(config),
        attention=attention,
        layers=layers,
        num_extra_layers=extra,
    )


def _check_experts(config: ConfigReader, gates: list[GateSpec]) -> None:
    if sum(gate.num_experts for gate in gates) > MAX_EXPERTS:
        raise CheckpointError(
            f"{config.where}: {len(gates)} layers of {gates[0].num_experts} experts.",
            f"At most {MAX_EXPERTS} can be run.",
        )
    for gate in gates[:1]:  # all are equal
        in_group, left_over = divmod(gate.num_experts, gate.num_groups)
        too_small = gate.num_groups > 1 and gate.group_score == "top2sum" and in_group < 2
        if left_over or too_small or gate.topk_groups > gate.num_groups or gate.top_k > in_group * gate.topk_groups:
            raise CheckpointError(
                f"{config.where}: {gate.num_experts} experts in {gate.num_groups} groups, of which {gate.topk_groups} "
                f"are kept, cannot give the top {gate.top_k}.",
                "num_experts_per_tok must be at most topk_group * n_routed_experts / n_group.",
            )


# ---------------------------------------------------------------- the table

_COMMON: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
_LATENT: dict[str, Any] = _COMMON | {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_interleave": True,
}
_QWEN: dict[str, Any] = _COMMON | {"sliding_window": 4096, "max_position_embeddings": 32768}

FAMILIES: dict[str, Family] = {
    "DeepseekV2ForCausalLM": Family(
        _deepseek_v2,
        _LATENT
        | {
            "max_position_embeddings": 2048,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "moe_intermediate_size": 1407,
            "first_k_dense_replace": 0,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
        },
    ),
    "DeepseekV3ForCausalLM": Family(
        _deepseek_v3,
        _LATENT
        | {
            "max_position_embeddings": 4096,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "moe_intermediate_size": 2048,
            "first_k_dense_replace": 3,
            "num_mtp_layers": 1,
        },
    ),
    "Glm4MoeForCausalLM": Family(
        _glm4_moe,
        _COMMON
        | {
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "max_position_embeddings": 131072,
            "use_qk_norm": False,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "moe_intermediate_size": 1408,
            "first_k_dense_replace": 1,
            "num_mtp_layers": 1,
        },
    ),
    "Qwen3MoeForCausalLM": Family(
        _qwen3_moe,
        _QWEN
        | {
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
        },
    ),
    "MixtralForCausalLM": Family(
        _mixtral,
        _COMMON
        | {
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
            "use_sliding_window": True,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "OlmoeForCausalLM": Family(
        _olmoe,
        _COMMON
        | {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "clip_qkv": None,
        },
    ),
    "LlamaForCausalLM": Family(_llama, _COMMON | {"max_position_embeddings": 2048}),
    "Qwen2ForCausalLM": Family(_qwen2, _QWEN | {"num_key_value_heads": 32}),
    "Qwen3ForCausalLM": Family(_qwen3, _QWEN | {"num_key_value_heads": 32, "head_dim": 128}),
}
