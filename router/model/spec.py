"""A model family's behaviour as values: configuration in, specs out. Torch-free.

The parameters are those that reproduce the routers and attentions of the supported families (docs/architecture.md);
adding a family that fits them is one entry in `families.py` and no code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from experts.spec import FFNSpec, GateSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding over the first `dim` values of a head.

    interleaved: pairs are (0, 1), (2, 3) ... instead of (i, i + dim / 2).
    scaling: none; llama3 (Llama 3.1); yarn (arXiv 2309.00071). cos_sin_scale multiplies cos and sin (YaRN only).
    """

    theta: float
    dim: int
    interleaved: bool = False
    scaling: Literal["none", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_max_len: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    truncate: bool = True
    cos_sin_scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GQASpec:
    """Grouped-query attention. qk_norm: RMS norm of q and k per head, or over all heads at once, before RoPE."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "per_head", "full"] = "none"
    clip_qkv: float | None = None

    @property
    def kv_values(self) -> int:
        """Cached values per token."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class MLASpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), computed in the absorbed form.

    The cache holds the normalised latent and the rotated shared key: kv_lora_rank + rope_head_dim values a token.
    latent_eps: epsilon of the latent norms, a constant of the family and not rms_norm_eps.
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int
    scale: float
    rope: RopeSpec
    bias: bool = False
    latent_eps: float = 1e-6

    @property
    def kv_values(self) -> int:
        """Cached values per token."""
        return self.kv_lora_rank + self.rope_head_dim


AttentionSpec = GQASpec | MLASpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseFFNSpec:
    """A layer's ordinary SwiGLU FFN."""

    intermediate_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESpec:
    """A layer's gate, routed experts and shared experts (fused into one FFN; 0: none)."""

    gate: GateSpec
    experts: FFNSpec
    shared_intermediate_size: int = 0
    gate_name: str = "model.layers.{layer}.mlp.gate.weight"
    select_bias_name: str = "model.layers.{layer}.mlp.gate.e_score_correction_bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A whole model. layers: the FFN of each layer; attention is the same in all of them.

    max_position: the longest sequence that the positions (or a sliding window) allow, in tokens.
    num_extra_layers: layers after the last that the checkpoint may hold and we do not use (multi-token prediction).
    """

    family: str
    vocab_size: int
    hidden_size: int
    rms_norm_eps: float
    tied_embeddings: bool
    max_position: int
    attention: AttentionSpec
    layers: tuple[DenseFFNSpec | MoESpec, ...]
    num_extra_layers: int = 0

    @property
    def num_layers(self) -> int:
        """Decoder layers that run."""
        return len(self.layers)

    @property
    def kv_values_per_token(self) -> int:
        """Cached values per token over all layers."""
        return self.num_layers * self.attention.kv_values

    @property
    def num_experts(self) -> int:
        """Routed experts in one MoE layer; 0 for a dense model."""
        return max((layer.gate.num_experts for layer in self.layers if isinstance(layer, MoESpec)), default=0)
