"""The trunk: everything of a model but its routed experts, which it calls through the ExpertPool."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from experts import kernels
from experts.pool import ExpertPool
from router.model.attention import build_attention
from router.model.batch import Batch
from router.model.gate import Gate
from router.model.rope import cos_sin_table
from router.model.spec import DenseFFNSpec, ModelSpec, MoESpec


class Load(Protocol):
    """Gives a tensor of the checkpoint by name, in the model's dtype unless another is asked for; a matrix that is held
    in few bits as a kernels.Weight, which is all that its users need."""

    def __call__(self, name: str, dtype: torch.dtype | None = None) -> Any: ...


class FFN(Protocol):
    """A layer's feed-forward half: [num_tokens, hidden] -> the same, and failed [num_tokens] bool."""

    def __call__(self, x: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]: ...


class Trunk:
    """A loaded model. forward is the only entry; it keeps nothing of a request but what it writes to the cache."""

    def __init__(self, spec: ModelSpec, load: Load, pool: ExpertPool | None, max_len: int) -> None:
        self.spec = spec
        self.embedding: kernels.Weight = load("model.embed_tokens.weight")
        self.final_norm: torch.Tensor = load("model.norm.weight")
        self.head: kernels.Weight = self.embedding if spec.tied_embeddings else load("lm_head.weight")
        self.max_len = max_len
        self.cos, self.sin = cos_sin_table(spec.attention.rope, max_len)
        self.layers = [DecoderLayer(spec, i, load, pool) for i in range(spec.num_layers)]

    def forward(self, batch: Batch, cache: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One step. cache: [num_layers, ...] as kv_cache/storage.py lays it out; its slots of this batch are written.

        Returns logits [num_samples, vocab] float32, and failed [num_tokens] bool: rows whose experts gave no finite
        answer.
        """
        hidden = kernels.take_rows(self.embedding, batch.token_ids).to(self.final_norm.dtype)
        positions = batch.positions.long()
        cos_sin = self.cos[positions], self.sin[positions]
        failed = torch.zeros(len(hidden), dtype=torch.bool)
        update: torch.Tensor | None = None
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            update, layer_failed = layer(hidden, update, cos_sin, batch, layer_cache, step)
            failed |= layer_failed
        assert update is not None
        rows = batch.sample_rows
        final = kernels.rms_norm(update[rows], self.final_norm, self.spec.rms_norm_eps, residual=hidden[rows])
        return kernels.linear(final, self.head, out_dtype=torch.float32), failed


class DecoderLayer:
    """Pre-norm attention and FFN. The residual is updated in place; the next norm adds the FFN's output."""

    def __init__(self, spec: ModelSpec, index: int, load: Load, pool: ExpertPool | None) -> None:
        prefix = f"model.layers.{index}."
        self.eps = spec.rms_norm_eps
        self.attention_norm: torch.Tensor = load(prefix + "input_layernorm.weight")
        self.attention = build_attention(spec.attention, lambda name: load(f"{prefix}self_attn.{name}"))
        self.ffn_norm = load(prefix + "post_attention_layernorm.weight")
        layer = spec.layers[index]
        self.ffn: FFN
        if isinstance(layer, DenseFFNSpec):
            self.ffn = SwiGLU(load, prefix + "mlp.", self.attention_norm.dtype)
        else:
            assert pool is not None
            self.ffn = MoE(layer, index, load, pool, self.attention_norm.dtype)

    def __call__(
        self,
        hidden: torch.Tensor,
        update: torch.Tensor | None,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        batch: Batch,
        cache: torch.Tensor,
        step: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden += update, then attention and FFN; returns the FFN's output, not yet added, and the failed rows."""
        if update is None:
            x = kernels.rms_norm(hidden, self.attention_norm, self.eps)
        else:
            x = kernels.rms_norm(update, self.attention_norm, self.eps, residual=hidden)
        attended = self.attention(x, cos_sin, batch, cache, self.eps)
        x = kernels.rms_norm(attended, self.ffn_norm, self.eps, residual=hidden)
        return self.ffn(x, step)


class SwiGLU:
    """A dense or shared FFN: down(silu(gate(x)) * up(x))."""

    def __init__(self, load: Load, prefix: str, dtype: torch.dtype) -> None:
        """dtype: of the rows."""
        gate, up, down = (load(f"{prefix}{name}_proj.weight") for name in ("gate", "up", "down"))
        self.table = kernels.ExpertTable({0: (gate, up, down)}, 1, dtype=dtype)

    def __call__(self, x: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_tokens, hidden] -> [num_tokens, hidden]: the kernel of the experts, with one that every token takes."""
        everyone = torch.zeros(len(x), 1, dtype=torch.int32)
        return kernels.moe(x, everyone, torch.ones(len(x), 1), self.table)


class MoE:
    """The gate, the pool's routed experts and the shared experts, which run while the pool works."""

    def __init__(self, spec: MoESpec, index: int, load: Load, pool: ExpertPool, dtype: torch.dtype) -> None:
        """dtype: of the rows."""
        bias = load(spec.select_bias_name.format(layer=index), torch.float32) if spec.gate.select_bias else None
        self.gate = Gate(spec.gate, load(spec.gate_name.format(layer=index)), bias)
        self.shared = (
            SwiGLU(load, f"model.layers.{index}.mlp.shared_experts.", dtype) if spec.shared_intermediate_size else None
        )
        self.index = index
        self.pool = pool

    def __call__(self, x: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_tokens, hidden] -> [num_tokens, hidden] and failed [num_tokens]."""
        topk_ids, topk_weights = self.gate(x)
        pending = self.pool.begin(step, self.index, x, topk_ids, topk_weights)
        if self.shared is None:
            return pending.wait()
        shared, shared_failed = self.shared(x, step)
        rows, failed = pending.wait()
        return rows + shared, failed | shared_failed
