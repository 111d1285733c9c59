"""The trunk: everything of a model but its routed experts, which it calls through the ExpertPool."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from experts import kernels
from experts.pool import ExpertPool
from router.kv_cache.storage import allocate_cache
from router.model.attention import build_attention
from router.model.batch import Batch
from router.model.rope import cos_sin_table
from router.model.spec import DenseFFNSpec, ModelSpec, MoESpec


class Load(Protocol):
    """Gives a tensor of the checkpoint by name, in the model's dtype unless another is asked for; a matrix that is held
    in few bits as a kernels.Weight, which is all that its users need."""

    def __call__(self, name: str, dtype: torch.dtype | None = None) -> Any: ...


class Trunk:
    """A loaded model. forward is the only entry; it keeps nothing of a request but what it writes to the cache."""

    def __init__(self, spec: ModelSpec, load: Load, pool: ExpertPool | None, max_len: int) -> None:
        self.spec = spec
        self.embedding: kernels.Weight = load("model.embed_tokens.weight")
        self.final_norm: torch.Tensor = load("model.norm.weight")
        self.head: kernels.Weight = self.embedding if spec.tied_embeddings else load("lm_head.weight")
        self.max_len = max_len
        self.cos, self.sin = cos_sin_table(spec.attention.rope, max_len)
        self.layers = [DecoderLayer(spec, i, load, pool, self.final_norm.dtype) for i in range(spec.num_layers)]
        self._pool = pool
        self._whole: kernels.WholeModel | None = None

    def allocate_cache(self, num_blocks: int, block_size: int) -> torch.Tensor:
        """See router.kv_cache.storage.allocate_cache."""
        return allocate_cache(self.spec, num_blocks, block_size, self.final_norm.dtype)

    def forward(self, batch: Batch, cache: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One step. cache: [num_layers, ...] as kv_cache/storage.py lays it out; its slots of this batch are written.

        Returns logits [num_samples, vocab] float32, and failed [num_tokens] bool: rows whose experts gave no finite
        answer.
        """
        whole = self._whole_model()
        if whole is None:
            return self._layer_by_layer(batch, cache, step)
        return whole.forward(
            cache,
            token_ids=batch.token_ids,
            positions=batch.positions,
            seq_ids=batch.seq_ids,
            slots=batch.slots,
            block_tables=batch.block_tables,
            sample_rows=batch.sample_rows,
        )

    def _layer_by_layer(self, batch: Batch, cache: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = kernels.take_rows(self.embedding, batch.token_ids).to(self.final_norm.dtype)
        rows = kernels.StepRows(
            hidden,
            cache,
            self.cos.index_select(0, batch.positions),
            self.sin.index_select(0, batch.positions),
            slots=batch.slots,
            seq_ids=batch.seq_ids,
            positions=batch.positions,
            block_tables=batch.block_tables,
        )
        failed: list[torch.Tensor] = []
        update: torch.Tensor | None = None
        for layer in self.layers:
            update, layer_failed = layer(update, rows, step)
            failed.append(layer_failed)
        assert update is not None
        wanted = batch.sample_rows
        update, hidden = update.index_select(0, wanted), hidden.index_select(0, wanted)
        final = kernels.rms_norm(update, self.final_norm, self.spec.rms_norm_eps, residual=hidden)
        return kernels.linear(final, self.head, out_dtype=torch.float32), torch.stack(failed).any(0)

    def _whole_model(self) -> kernels.WholeModel | None:
        """The same in one call, where the kernels are compiled and nothing stands before the experts."""
        tables = self._pool.tables if self._pool else {}
        if tables is None or not kernels.compiled():
            return None
        if self._whole is None:
            self._whole = kernels.WholeModel(
                [layer.parts(tables) for layer in self.layers],
                self.embedding,
                self.head,
                self.final_norm,
                self.spec.rms_norm_eps,
                self.cos,
                self.sin,
            )
        return self._whole


class DecoderLayer:
    """Pre-norm attention and FFN. The residual is updated in place; the next norm adds the FFN's output."""

    def __init__(self, spec: ModelSpec, index: int, load: Load, pool: ExpertPool | None, dtype: torch.dtype) -> None:
        prefix = f"model.layers.{index}."
        self.attention = build_attention(spec, index, lambda name: load(prefix + name))
        layer = spec.layers[index]
        self.ffn: SwiGLU | MoE
        if isinstance(layer, DenseFFNSpec):
            self.ffn = SwiGLU(load, prefix + "mlp.", dtype)
        else:
            assert pool is not None
            self.ffn = MoE(layer, index, load, pool, dtype)

    def __call__(
        self, update: torch.Tensor | None, rows: kernels.StepRows, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """residual += update, then attention and FFN; returns the FFN's output, not yet added, and the failed rows."""
        return self.ffn(self.attention(update, rows), step)

    def parts(self, tables: Mapping[int, kernels.ExpertTable]) -> kernels.LayerParts:
        """What one call for all layers takes of this one. tables: the experts of each MoE layer."""
        if isinstance(self.ffn, SwiGLU):
            return kernels.LayerParts(self.attention, None, None, self.ffn.table, None)
        moe = self.ffn
        return kernels.LayerParts(
            self.attention,
            moe.gate,
            tables[moe.index],
            moe.shared.table if moe.shared else None,
            moe.pool.counter(moe.index),
        )


class SwiGLU:
    """A dense or shared FFN: down(silu(gate(x)) * up(x))."""

    def __init__(self, load: Load, prefix: str, dtype: torch.dtype) -> None:
        """dtype: of the rows."""
        gate, up, down = (load(f"{prefix}{name}_proj.weight") for name in ("gate", "up", "down"))
        self.table = kernels.ExpertTable({0: (gate, up, down)}, 1, dtype=dtype)

    def __call__(self, x: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_tokens, hidden] -> [num_tokens, hidden]: the kernel of the experts, with one that every token takes."""
        return kernels.moe(x, *_everyone(x.shape[0]), self.table)


@functools.lru_cache(maxsize=8)
def _everyone(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """topk_ids and topk_weights of a layer whose only expert every token takes."""
    return torch.zeros(num_tokens, 1, dtype=torch.int32), torch.ones(num_tokens, 1)


class MoE:
    """The gate, the pool's routed experts and the shared experts, which run while the pool works."""

    def __init__(self, spec: MoESpec, index: int, load: Load, pool: ExpertPool, dtype: torch.dtype) -> None:
        """dtype: of the rows."""
        bias = load(spec.select_bias_name.format(layer=index), torch.float32) if spec.gate.select_bias else None
        weight = load(spec.gate_name.format(layer=index))
        if spec.gate.float32_logits:
            weight = weight.float()
        self.gate = kernels.GateLayer(spec.gate, weight, bias, dtype)
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
