"""Write a random checkpoint with the layer shapes of a real model: random weights read the same bytes as trained ones.

    python -m benchmarks.random_model DIR [--shapes qwen3-30b-a3b] [--layers 8]

8 layers of Qwen3-30B-A3B: 5 B parameters, 0.55 B a token, 10 GB in bfloat16. For speed, never for quality.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from router.model.families import model_spec
from router.model.tensors import expert_tensors, trunk_tensors

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "vocab_size": 49152,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    # With the q_lora_rank of DeepSeek-V2: llama.cpp knows the Lite model, which has none, by its 27 layers alone.
    "deepseek-v2-lite": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 1408,
        "intermediate_size": 10944,
        "vocab_size": 102400,
        "max_position_embeddings": 40960,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
}


def main() -> None:
    """Write config.json and one shard for each layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shapes", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=8)
    args = parser.parse_args()
    write_model(args.directory, SHAPES[args.shapes] | {"num_hidden_layers": args.layers})


def write_model(directory: Path, config: dict[str, Any]) -> None:
    """The checkpoint of such a configuration, of one seed."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    spec = model_spec(config)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in (trunk_tensors(spec) | expert_tensors(spec)).items():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = shape
    torch.manual_seed(0)
    for file, shapes in shards.items():
        save_file({name: random_tensor(shape) for name, shape in shapes.items()}, directory / file)
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def random_tensor(shape: tuple[int, ...]) -> torch.Tensor:
    """Norms of ones, matrices of small normal numbers."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)


if __name__ == "__main__":
    main()
