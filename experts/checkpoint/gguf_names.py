"""What each GGUF architecture is called in Hugging Face's words: one table entry per family.

Sources: the tensor tables of the gguf package and llama.cpp's converters; the Hugging Face side is each family's
published config.json and checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# GGUF name -> Hugging Face name, outside the layers.
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

# Within layer N: blk.N.<stem>.weight -> model.layers.N.<stem>.weight; the same for .bias.
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_DENSE_FFN = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_MOE_GATE = {"ffn_gate_inp": "mlp.gate"}
_MIXTRAL_GATE = {"ffn_gate_inp": "block_sparse_moe.gate"}


def _experts(prefix: str, gate: str, up: str, down: str) -> dict[str, tuple[str, ...]]:
    """The 3-D expert tensors: stem -> one template per matrix, in the order of their rows."""
    gate, up, down = (f"{prefix}.{{expert}}.{role}" for role in (gate, up, down))
    return {"ffn_gate_exps": (gate,), "ffn_up_exps": (up,), "ffn_down_exps": (down,), "ffn_gate_up_exps": (gate, up)}


# config.json key -> GGUF key without the architecture's prefix. All are required integers.
_BASE_CONFIG = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFFamily:
    """How one family is written in GGUF.

    layer_names, expert_names: stem within a layer -> name or templates. config_keys: required integers.
    constants: config.json values that GGUF does not store. interleaved_qk: the converter reordered q and k rows.
    """

    architecture: str
    model_type: str
    layer_names: Mapping[str, str]
    expert_names: Mapping[str, tuple[str, ...]]
    config_keys: Mapping[str, str]
    constants: Mapping[str, Any]
    interleaved_qk: bool = False


FAMILIES = {
    "llama": GGUFFamily(
        architecture="LlamaForCausalLM",
        model_type="llama",
        layer_names=_ATTENTION | _DENSE_FFN,
        expert_names={},
        config_keys=_BASE_CONFIG,
        constants={"mlp_bias": False},
        interleaved_qk=True,
    ),
    "mixtral": GGUFFamily(
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        layer_names=_ATTENTION | _MIXTRAL_GATE,
        expert_names=_experts("block_sparse_moe.experts", "w1", "w3", "w2"),
        config_keys=_BASE_CONFIG | {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
        constants={"sliding_window": None},
        interleaved_qk=True,
    ),
    "qwen2": GGUFFamily(
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        layer_names=_ATTENTION | _DENSE_FFN,
        expert_names={},
        config_keys=_BASE_CONFIG,
        constants={"use_sliding_window": False},
    ),
    "qwen3": GGUFFamily(
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        layer_names=_ATTENTION | _QK_NORM | _DENSE_FFN,
        expert_names={},
        config_keys=_BASE_CONFIG,
        constants={"use_sliding_window": False},
    ),
    "qwen3moe": GGUFFamily(
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        layer_names=_ATTENTION | _QK_NORM | _MOE_GATE,
        expert_names=_experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
        config_keys=_BASE_CONFIG
        | {
            "num_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
            "moe_intermediate_size": "expert_feed_forward_length",
        },
        # Every published checkpoint of the family normalises and has experts in every layer; GGUF stores neither.
        constants={
            "use_sliding_window": False,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
}
