"""Tiny checkpoints of every family, made by transformers with wide random weights.

The usual 0.02 initialisation makes gate scores near-uniform and norms all ones, and bugs pass; so matrices are drawn
with standard deviation 1 / sqrt(inputs), norms around one, biases around zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "moe_intermediate_size": 40,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PARTIAL: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
MOE: dict[str, Any] = {"num_experts_per_tok": 3, "moe_intermediate_size": 40}
QWEN_MOE: dict[str, Any] = MOE | {"num_experts": 10, "norm_topk_prob": True, "head_dim": 24}
GLM: dict[str, Any] = MOE | {"n_routed_experts": 10, "head_dim": 16, "first_k_dense_replace": 1, "attention_bias": True}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("DeepseekV3", MLA | {"q_lora_rank": 48, "num_mtp_layers": 0}),
    "deepseek_v3_yarn_bias": (
        "DeepseekV3",
        MLA | {"q_lora_rank": 48, "rope_parameters": YARN, "attention_bias": True, "num_mtp_layers": 0},
    ),
    "deepseek_v3_no_q_lora": ("DeepseekV3", MLA | {"q_lora_rank": None, "num_mtp_layers": 0}),
    "deepseek_v2": ("DeepseekV2", MLA | {"q_lora_rank": None, "topk_method": "greedy", "rope_parameters": YARN}),
    "deepseek_v2_grouped": (
        "DeepseekV2",
        MLA | {"q_lora_rank": 48, "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0},
    ),
    "glm4_moe": ("Glm4Moe", GLM | {"use_qk_norm": True, "rope_parameters": PARTIAL}),
    "glm4_moe_plain": ("Glm4Moe", GLM | {"n_shared_experts": 2, "attention_bias": False, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", QWEN_MOE),
    "qwen3_moe_sparse": ("Qwen3Moe", QWEN_MOE | {"decoder_sparse_step": 2, "norm_topk_prob": False}),
    "mixtral": ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "olmoe": ("Olmoe", {"num_experts": 10, "num_experts_per_tok": 3}),
    "olmoe_clipped": ("Olmoe", {"num_experts": 10, "num_experts_per_tok": 3, "clip_qkv": 0.5}),
    "llama": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama_bias": ("Llama", {"attention_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
}


def make(family: str, directory: Path, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """Write a tiny checkpoint of the family into the directory; returns transformers' model of it, in float32."""
    name, values = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(COMMON | values | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    widen(model)
    model.save_pretrained(directory)
    return model


@torch.no_grad()
def widen(model: torch.nn.Module) -> None:
    """Re-draw every parameter and buffer that a checkpoint holds."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if tensor.ndim >= 2:
            tensor.normal_(0, tensor.shape[-1] ** -0.5)
        elif name.endswith("norm.weight"):
            tensor.normal_(1, 0.1)
        else:
            tensor.normal_(0, 0.1)
