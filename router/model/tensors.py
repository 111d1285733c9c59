"""Which tensors a spec needs: names, shapes, and what they add up to. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from router.model.spec import DenseFFNSpec, GQASpec, MLASpec, ModelSpec, MoESpec

Shapes = dict[str, tuple[int, ...]]

_SINGLE_MATRIX = re.compile(
    r"model\.embed_tokens\.weight|lm_head\.weight"
    r"|model\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa)\.weight"
)


def trunk_tensors(spec: ModelSpec) -> Shapes:
    """Checkpoint name to shape of everything but the routed experts."""
    hidden = spec.hidden_size
    shapes: Shapes = {"model.embed_tokens.weight": (spec.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not spec.tied_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    for index, layer in enumerate(spec.layers):
        prefix = f"model.layers.{index}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        attention = _gqa_tensors if isinstance(spec.attention, GQASpec) else _mla_tensors
        shapes |= {f"{prefix}self_attn.{k}": v for k, v in attention(spec.attention, hidden).items()}  # type: ignore[arg-type]
        shapes |= _ffn_tensors(layer, index, hidden)
    return shapes


def trunk_groups(spec: ModelSpec) -> list[Shapes]:
    """The trunk's matrices that may be of few bits; those that one kernel call takes together in one group.

    Not among them: the gates, because another choice of experts costs more than the bits save; and latent attention's
    kv_b_proj, which is taken apart before it is used.
    """
    shapes = trunk_tensors(spec)
    groups = [{name: shape} for name, shape in shapes.items() if _SINGLE_MATRIX.fullmatch(name)]
    for index, layer in enumerate(spec.layers):
        prefix = f"model.layers.{index}.mlp."
        if isinstance(layer, MoESpec):
            prefix += "shared_experts."
        if isinstance(layer, DenseFFNSpec) or layer.shared_intermediate_size:
            names = [f"{prefix}{role}_proj.weight" for role in ("gate", "up", "down")]
            groups.append({name: shapes[name] for name in names})
    return groups


def expert_tensors(spec: ModelSpec) -> Shapes:
    """Checkpoint name to shape of every routed expert."""
    shapes: Shapes = {}
    for index, layer in enumerate(spec.layers):
        if isinstance(layer, MoESpec):
            for expert in range(layer.experts.num_experts):
                shapes |= layer.experts.tensors(index, expert)
    return shapes


def ignored_tensors(spec: ModelSpec) -> Callable[[str], bool]:
    """Names that a checkpoint may hold and that we do not use: prediction layers, rotary buffers, a tied head."""
    extra = "|".join(str(spec.num_layers + i) for i in range(spec.num_extra_layers)) or "none"
    tied = r"|lm_head\.weight" if spec.tied_embeddings else ""
    pattern = re.compile(rf"model\.layers\.({extra})\..*|.*rotary_emb\.inv_freq{tied}")
    return lambda name: pattern.fullmatch(name) is not None


def count_parameters(spec: ModelSpec) -> tuple[int, int]:
    """(total, active): active are the weights read for one token, without the input embedding table unless tied."""
    trunk = sum(math.prod(shape) for shape in trunk_tensors(spec).values())
    routed = [layer for layer in spec.layers if isinstance(layer, MoESpec)]
    total = trunk + sum(layer.experts.num_experts * layer.experts.parameters for layer in routed)
    table = 0 if spec.tied_embeddings else spec.vocab_size * spec.hidden_size
    return total, trunk - table + sum(layer.gate.top_k * layer.experts.parameters for layer in routed)


def _gqa_tensors(spec: GQASpec, hidden: int) -> Shapes:
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: Shapes = {
        "q_proj.weight": (q_size, hidden),
        "k_proj.weight": (kv_size, hidden),
        "v_proj.weight": (kv_size, hidden),
        "o_proj.weight": (hidden, q_size),
    }
    if spec.qkv_bias:
        shapes |= {"q_proj.bias": (q_size,), "k_proj.bias": (kv_size,), "v_proj.bias": (kv_size,)}
    if spec.out_bias:
        shapes["o_proj.bias"] = (hidden,)
    if spec.qk_norm != "none":
        per_head = spec.qk_norm == "per_head"
        shapes["q_norm.weight"] = (spec.head_dim if per_head else q_size,)
        shapes["k_norm.weight"] = (spec.head_dim if per_head else kv_size,)
    return shapes


def _mla_tensors(spec: MLASpec, hidden: int) -> Shapes:
    q_size = spec.num_heads * (spec.nope_head_dim + spec.rope_head_dim)
    shapes: Shapes = {
        "kv_a_proj_with_mqa.weight": (spec.kv_lora_rank + spec.rope_head_dim, hidden),
        "kv_a_layernorm.weight": (spec.kv_lora_rank,),
        "kv_b_proj.weight": (spec.num_heads * (spec.nope_head_dim + spec.v_head_dim), spec.kv_lora_rank),
        "o_proj.weight": (hidden, spec.num_heads * spec.v_head_dim),
    }
    if spec.bias:
        shapes |= {"kv_a_proj_with_mqa.bias": (spec.kv_lora_rank + spec.rope_head_dim,), "o_proj.bias": (hidden,)}
    if spec.q_lora_rank is None:
        return shapes | {"q_proj.weight": (q_size, hidden)}
    if spec.bias:
        shapes["q_a_proj.bias"] = (spec.q_lora_rank,)
    return shapes | {
        "q_a_proj.weight": (spec.q_lora_rank, hidden),
        "q_a_layernorm.weight": (spec.q_lora_rank,),
        "q_b_proj.weight": (q_size, spec.q_lora_rank),
    }


def _ffn_tensors(layer: DenseFFNSpec | MoESpec, index: int, hidden: int) -> Shapes:
    prefix = f"model.layers.{index}.mlp."
    if isinstance(layer, DenseFFNSpec):
        return _swiglu(prefix, hidden, layer.intermediate_size)
    shapes: Shapes = {layer.gate_name.format(layer=index): (layer.gate.num_experts, hidden)}
    if layer.gate.select_bias:
        shapes[layer.select_bias_name.format(layer=index)] = (layer.gate.num_experts,)
    if layer.shared_intermediate_size:
        shapes |= _swiglu(prefix + "shared_experts.", hidden, layer.shared_intermediate_size)
    return shapes


def _swiglu(prefix: str, hidden: int, intermediate: int) -> Shapes:
    return {
        prefix + "gate_proj.weight": (intermediate, hidden),
        prefix + "up_proj.weight": (intermediate, hidden),
        prefix + "down_proj.weight": (hidden, intermediate),
    }
