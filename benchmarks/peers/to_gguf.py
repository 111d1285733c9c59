"""A random Qwen3-MoE checkpoint (benchmarks.random_model) as GGUF: python -m benchmarks.peers.to_gguf DIR OUT.gguf Q4_0

Every matrix in the one type, as Barista holds every matrix in one format.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open

NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
KEPT = ("norm", "ffn_gate_inp")  # in float32, as llama.cpp's own converter leaves them


def main(source: Path, target: Path, kind: str) -> None:
    """Write the file."""
    config = json.loads((source / "config.json").read_text())
    files = [safe_open(path, "pt") for path in sorted(source.glob("*.safetensors"))]
    place = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    writer = gguf.GGUFWriter(target, "qwen3moe")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")

    def tensor(name: str) -> np.ndarray:
        values: np.ndarray = place[name].get_tensor(name).float().numpy()
        return values

    def add(name: str, values: np.ndarray) -> None:
        if values.ndim == 1 or any(part in name for part in KEPT):
            writer.add_tensor(name, values)
            return
        quantised = gguf.quants.quantize(values.reshape(-1, values.shape[-1]), gguf.GGMLQuantizationType[kind])
        writer.add_tensor(
            name, quantised.reshape(*values.shape[:-1], -1), raw_dtype=gguf.GGMLQuantizationType[kind]
        )  # fmt: skip

    add("token_embd.weight", tensor("model.embed_tokens.weight"))
    add("output.weight", tensor("lm_head.weight"))
    add("output_norm.weight", tensor("model.norm.weight"))
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in NAMES.items():
            add(f"blk.{layer}.{theirs}.weight", tensor(f"model.layers.{layer}.{ours}.weight"))
        for part in ("gate", "up", "down"):
            names = (f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight" for e in range(config["num_experts"]))
            add(f"blk.{layer}.ffn_{part}_exps.weight", np.stack([tensor(name) for name in names]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
