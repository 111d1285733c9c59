"""From a dense checkpoint and a recipe to a directory that transformers and Barista load as Glm4MoeForCausalLM.

The gate is DeepSeek-V3's (arXiv 2412.19437, section 2.1.2): sigmoid scores, a correction bias for the choice alone,
weights normalised over the chosen experts and scaled. Its weights are made so small that every sigmoid stands next to
a half and every normalised weight next to 1 / top_k; scaled by top_k, each chosen expert counts once, as in the dense
FFN.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from barista.errors import CacheError
from experts.checkpoint import Checkpoint
from experts.checkpoint.safetensors_dir import INDEX_NAME
from experts.weights import WeightReader
from router.carve.clustering import LayerRecipe
from router.carve.layout import Layout
from router.carve.recipe import Recipe
from router.model.spec import GQASpec, ModelSpec
from router.model.tensors import trunk_tensors

# Small enough that the weights stay within half a per cent of 1 / top_k, large enough that float32 ranks the experts.
GATE_SCALE = 1e-4
SIGMOID_SLOPE = 0.25
SHARD_BYTES = 4_000_000_000
GENERATION_CONFIG = "generation_config.json"
_KEPT = {"BF16": torch.bfloat16, "F16": torch.float16}
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """How the trunk is written. bfloat16 and float16 stay as they are, since carving only moves them; all else becomes
    float32."""
    return _KEPT.get(checkpoint.tensors["model.embed_tokens.weight"].dtype, torch.float32)


def ffn_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """How experts are written. Those of quantised blocks, whose scales are float16, become float16: half the bytes at
    an error that the logits hardly show, which cannot be said of embeddings and attention."""
    quantised = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].dtype not in (*_KEPT, "F32")
    return torch.float16 if quantised else stored_dtype(checkpoint)


def write_config(folder: Path, checkpoint: Checkpoint, spec: ModelSpec, layout: Layout) -> None:
    """config.json, and generation_config.json unless the folder has the source's own."""
    dtype = str(stored_dtype(checkpoint)).removeprefix("torch.")
    config = glm4_moe_config(checkpoint.config, spec, layout) | {"dtype": dtype}
    _write_json(folder / "config.json", config)
    if not (folder / GENERATION_CONFIG).exists():
        _write_json(folder / GENERATION_CONFIG, {key: config[key] for key in _SPECIAL_IDS if config[key] is not None})


def glm4_moe_config(source: dict[str, Any], spec: ModelSpec, layout: Layout) -> dict[str, Any]:
    """The configuration of the carved model. source: the dense model's; spec: what it means."""
    attention = spec.attention
    assert isinstance(attention, GQASpec)
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "hidden_act": "silu",
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.qkv_bias,
        "use_qk_norm": attention.qk_norm != "none",
        "rope_parameters": _rope_parameters(source, attention.rope.theta),
        "partial_rotary_factor": 1.0,
        "max_position_embeddings": spec.max_position,
        "rms_norm_eps": spec.rms_norm_eps,
        "tie_word_embeddings": spec.tied_embeddings,
        "intermediate_size": layout.intermediate_size,
        "moe_intermediate_size": layout.expert_size,
        "n_shared_experts": layout.num_shared,
        "n_routed_experts": layout.num_experts,
        "num_experts_per_tok": layout.top_k,
        "routed_scaling_factor": float(layout.top_k),
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
        **{key: source.get(key) for key in _SPECIAL_IDS},
    }


def _rope_parameters(source: dict[str, Any], theta: float) -> dict[str, Any]:
    """The source's RoPE scaling, if any, under transformers 5's names."""
    given = {**(source.get("rope_scaling") or {}), **(source.get("rope_parameters") or {})}
    kind = given.pop("type", None)
    if kind is not None:
        given.setdefault("rope_type", kind)
    return {"rope_type": "default", **given, "rope_theta": theta, "partial_rotary_factor": 1.0}


def carved_tensors(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the carved checkpoint by name, layer by layer."""
    shapes, reader, dtype = trunk_tensors(spec), WeightReader(checkpoint), stored_dtype(checkpoint)
    for name, shape in shapes.items():
        if ".mlp." not in name:
            yield name, reader.get(name, shape, dtype)
    for index, layer in enumerate(recipe.layers):
        prefix = f"model.layers.{index}.mlp."
        gate, up, down = (
            reader.get(name, shapes[name], ffn_dtype(checkpoint))
            for name in (f"{prefix}{part}_proj.weight" for part in ("gate", "up", "down"))
        )
        moved = {
            "gate_proj.weight": gate[layer.permutation],
            "up_proj.weight": up[layer.permutation],
            "down_proj.weight": down[:, layer.permutation],
        }
        yield from _ffn_tensors(prefix, moved, recipe.layout)
        yield from _gate_tensors(prefix + "gate.", layer)


def _ffn_tensors(prefix: str, moved: dict[str, torch.Tensor], layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
    """Slices of the permuted FFN: the shared experts as one, then each expert."""
    sizes = [layout.shared_size] + [layout.expert_size] * layout.num_experts
    names = ["shared_experts."] + [f"experts.{expert}." for expert in range(layout.num_experts)]
    for part, weight in moved.items():
        slices = torch.split(weight, sizes, dim=1 if part.startswith("down") else 0)
        yield from ((prefix + name + part, piece.contiguous()) for name, piece in zip(names, slices, strict=True))


def _gate_tensors(prefix: str, layer: LayerRecipe) -> Iterator[tuple[str, torch.Tensor]]:
    """sigmoid(s * z) is 1/2 + s * z / 4 near zero, so the correction bias is s / 4 of the regression's intercept."""
    yield prefix + "weight", layer.gate_weight * GATE_SCALE
    yield prefix + "e_score_correction_bias", layer.gate_bias * (GATE_SCALE * SIGMOID_SLOPE)


def write_tensors(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> int:
    """Write .safetensors files of at most SHARD_BYTES, with an index if there is more than one. Returns the bytes."""
    total, shards = 0, []
    for index, shard in enumerate(_shards(tensors)):
        _save(shard, folder / f"shard-{index}")
        total += sum(tensor.nbytes for tensor in shard.values())
        shards.append(list(shard))
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        (folder / f"shard-{index}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        _write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def _shards(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    nbytes = 0
    for name, tensor in tensors:
        if shard and nbytes + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, nbytes = {}, 0
        shard[name] = tensor
        nbytes += tensor.nbytes
    yield shard


def _save(shard: dict[str, torch.Tensor], file: Path) -> None:
    try:
        save_file(shard, file, metadata={"format": "pt"})
    except SafetensorError as error:  # it wraps the operating system's errors
        raise CacheError(f"cannot write {file.parent}: {error}.", "Free some space, or choose another disk.") from error
    file.chmod(0o644)  # the library makes it private; a model is often served by another user


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
