"""A checkpoint of benchmarks.random_model as GGUF: python -m benchmarks.peers.to_gguf DIR OUT.gguf Q4_0

Every matrix in the one type, as Barista holds every matrix in one format.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "mlp.gate": "ffn_gate_inp", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}  # fmt: skip
KEPT = ("norm", "ffn_gate_inp")  # in float32, as llama.cpp's own converter leaves them


class Checkpoint:
    """Its config, and its tensors by name."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
        self._place = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (it is no mapping)

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def tensor(self, name: str) -> np.ndarray:
        """In float32."""
        values: np.ndarray = self._place[name].get_tensor(name).float().numpy()
        return values


def main(source: Path, target: Path, kind: str) -> None:
    """Write the file."""
    checkpoint = Checkpoint(source)
    config = checkpoint.config
    latent = "kv_lora_rank" in config
    writer = gguf.GGUFWriter(target, "deepseek2" if latent else "qwen3moe")
    add_settings(writer, config)
    (add_latent_settings if latent else add_grouped_settings)(writer, config)

    def add(name: str, values: np.ndarray) -> None:
        if values.ndim == 1 or any(part in name for part in KEPT):
            writer.add_tensor(name, values)
            return
        quantised = gguf.quants.quantize(values.reshape(-1, values.shape[-1]), gguf.GGMLQuantizationType[kind])
        writer.add_tensor(
            name, quantised.reshape(*values.shape[:-1], -1), raw_dtype=gguf.GGMLQuantizationType[kind]
        )  # fmt: skip

    add("token_embd.weight", checkpoint.tensor("model.embed_tokens.weight"))
    add("output.weight", checkpoint.tensor("lm_head.weight"))
    add("output_norm.weight", checkpoint.tensor("model.norm.weight"))
    num_experts = config["n_routed_experts"] if latent else config["num_experts"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for ours, theirs in NAMES.items():
            if (name := f"{prefix}{ours}.weight") in checkpoint:
                add(f"blk.{layer}.{theirs}.weight", checkpoint.tensor(name))
        if latent:  # llama.cpp takes its halves as the absorbed form does
            up = checkpoint.tensor(f"{prefix}self_attn.kv_b_proj.weight")
            up = up.reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
            nope = config["qk_nope_head_dim"]
            add(f"blk.{layer}.attn_k_b.weight", np.ascontiguousarray(up[:, :nope].transpose(0, 2, 1)))
            add(f"blk.{layer}.attn_v_b.weight", np.ascontiguousarray(up[:, nope:]))
        if f"{prefix}mlp.gate.weight" in checkpoint:
            for part in ("gate", "up", "down"):
                names = (f"{prefix}mlp.experts.{e}.{part}_proj.weight" for e in range(num_experts))
                add(f"blk.{layer}.ffn_{part}_exps.weight", np.stack([checkpoint.tensor(name) for name in names]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_settings(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """What both families have."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


def add_grouped_settings(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Grouped-query attention and experts as Qwen3-MoE has them."""
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_expert_count(config["num_experts"])


def add_latent_settings(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Latent attention, as one shared head, and experts as DeepSeek-V2 has them."""
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rope)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
