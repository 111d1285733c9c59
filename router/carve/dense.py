"""The dense model's forward pass, layer by layer over all calibration tokens, to see what each FFN is given.

Plain torch in float32: one layer's weights are in memory at a time, and no cache of keys and values is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from experts.checkpoint import Checkpoint
from experts.weights import WeightReader
from router.model.rope import cos_sin_table
from router.model.spec import GQASpec, ModelSpec
from router.model.tensors import trunk_tensors

Load = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class DenseFFN:
    """down(silu(gate(x)) * up(x)). gate, up: [intermediate, hidden]; down: [hidden, intermediate]; float32."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def activations(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden] -> [num_tokens, intermediate]: each neuron's activation."""
        return F.silu(x @ self.gate.T) * (x @ self.up.T)


def float32_loader(checkpoint: Checkpoint, spec: ModelSpec) -> Load:
    """A function from a trunk tensor's name to the tensor in float32."""
    reader, shapes = WeightReader(checkpoint), trunk_tensors(spec)
    return lambda name: reader.get(name, shapes[name], torch.float32)


def ffn_inputs(load: Load, spec: ModelSpec, token_ids: torch.Tensor) -> Iterator[tuple[torch.Tensor, DenseFFN]]:
    """For each layer in order: its FFN's inputs [num_sequences * length, hidden] float32, and its FFN.

    token_ids: [num_sequences, length]; every sequence starts at position 0. spec: dense, with grouped-query attention.
    """
    num_sequences, length = token_ids.shape
    assert isinstance(spec.attention, GQASpec)
    cos_sin = cos_sin_table(spec.attention.rope, length)
    hidden = load("model.embed_tokens.weight")[token_ids]
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        attention = _Attention(spec.attention, spec.rms_norm_eps, lambda name, p=prefix: load(f"{p}self_attn.{name}"))  # type: ignore[misc]
        norm = load(prefix + "input_layernorm.weight")
        for index in range(num_sequences):
            hidden[index] += attention(rms_norm(hidden[index], norm, spec.rms_norm_eps), cos_sin)
        x = rms_norm(hidden, load(prefix + "post_attention_layernorm.weight"), spec.rms_norm_eps)
        ffn = DenseFFN(*(load(f"{prefix}mlp.{part}_proj.weight") for part in ("gate", "up", "down")))
        yield x.view(num_sequences * length, -1), ffn
        for index in range(num_sequences):
            hidden[index] += ffn.activations(x[index]) @ ffn.down.T


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class _Attention:
    """Causal grouped-query attention of one sequence."""

    def __init__(self, spec: GQASpec, eps: float, load: Load) -> None:
        self.spec, self.eps = spec, eps
        self.weights = {part: load(f"{part}_proj.weight") for part in "qkvo"}
        self.biases = {part: load(f"{part}_proj.bias") if spec.qkv_bias else None for part in "qkv"}
        self.norms = {part: load(f"{part}_norm.weight") if spec.qk_norm != "none" else None for part in "qk"}

    def __call__(self, x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """x: [length, hidden] -> [length, hidden]."""
        q, k, v = (F.linear(x, self.weights[part], self.biases[part]) for part in "qkv")
        q, k, v = (rows.view(len(x), -1, self.spec.head_dim).transpose(0, 1) for rows in (q, k, v))
        q, k = self._place(q, "q", cos_sin), self._place(k, "k", cos_sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.spec.scale, enable_gqa=True)
        return out.transpose(0, 1).reshape(len(x), -1) @ self.weights["o"].T

    def _place(self, rows: torch.Tensor, part: str, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Normalise each head where the family does, then rotate. rows: [num_heads, length, head_dim]."""
        norm = self.norms[part]
        if norm is not None:
            rows = rms_norm(rows, norm, self.eps)
        cos, sin = cos_sin
        first, second = rows.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
