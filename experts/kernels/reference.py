"""The kernels in plain torch: the slow oracle of the tests, and the stand-in where nothing can be compiled.

Signatures and meaning are those of experts.kernels; math is in float32, rounded where the kernels round.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from experts.kernels.expert_table import ExpertTable
from experts.kernels.weight import Weight
from experts.spec import GateSpec


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See experts.kernels.linear."""
    result = x.float() @ weight.float().T
    if bias is not None:
        result = result + bias.float()
    if out is not None:
        return out.copy_(result)
    return result.to(out_dtype or x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None) -> Tensor:
    """See experts.kernels.rms_norm."""
    if residual is not None:
        x = residual.add_(x)
    hidden_states = x.float()
    hidden_states = hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + eps)
    return weight * hidden_states.to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See experts.kernels.silu_mul."""
    return functional.silu(gate.float()).to(gate.dtype) * up


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """See experts.kernels.rope."""
    half = cos.shape[1]
    rotated = x[..., : 2 * half]
    first, second = (
        (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else (rotated[..., :half], rotated[..., half:])
    )
    a, b = first.to(torch.float32, copy=True), second.to(torch.float32, copy=True)
    c, s = cos[:, None], sin[:, None]
    first.copy_(a * c - b * s)
    second.copy_(b * c + a * s)
    return x


def gate(router_logits: Tensor, spec: GateSpec, select_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See experts.kernels.gate."""
    scores = router_logits.softmax(dim=-1) if spec.score == "softmax" else router_logits.sigmoid()
    choice = scores if select_bias is None else scores + select_bias
    if spec.topk_groups < spec.num_groups:
        choice = _mask_groups(choice, spec)
    topk_ids = choice.topk(spec.top_k, dim=-1).indices
    topk_weights = scores.gather(1, topk_ids)
    if spec.normalise:
        topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + spec.norm_eps)
    if spec.scale != 1.0:
        topk_weights = topk_weights * spec.scale
    return topk_ids.int(), topk_weights


def _mask_groups(choice: Tensor, spec: GateSpec) -> Tensor:
    """Experts outside the best groups take the masked value (DeepSeek's node-limited routing)."""
    groups = choice.view(len(choice), spec.num_groups, -1)
    best = groups.topk(1 if spec.group_score == "max" else 2, dim=-1).values
    score = best[..., 0] if spec.group_score == "max" else best[..., 0] + best[..., 1]
    kept = torch.zeros_like(score, dtype=torch.bool)
    kept.scatter_(1, score.topk(spec.topk_groups, dim=-1).indices, True)
    return groups.masked_fill(~kept[:, :, None], spec.masked_value).view_as(choice)


def moe(hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: ExpertTable) -> tuple[Tensor, Tensor]:
    """See experts.kernels.moe."""
    total = torch.zeros(hidden_states.shape, dtype=torch.float32)
    for place in range(topk_ids.shape[1]):
        for expert in set(topk_ids[:, place].tolist()):
            if expert == -1:
                continue
            gate, up, down = experts[expert]
            tokens = (topk_ids[:, place] == expert).nonzero()[:, 0]
            x = hidden_states[tokens]
            rows = linear(silu_mul(linear(x, gate), linear(x, up)), down).float()
            total[tokens] += rows * topk_weights[tokens, place, None]
    result = total.to(hidden_states.dtype)
    failed = ~result.isfinite().all(-1)
    return result.masked_fill_(failed[:, None], 0), failed


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_ids: Tensor,
    positions: Tensor,
    scale: float,
    *,
    block_size: int,
) -> Tensor:
    """See experts.kernels.attention."""
    out = torch.empty((*q.shape[:2], v_cache.shape[3]), dtype=q.dtype)
    group = q.shape[1] // k_cache.shape[2]
    for token, (sequence, position) in enumerate(zip(seq_ids.tolist(), positions.tolist(), strict=True)):
        blocks = block_tables[sequence, : position // block_size + 1]
        keys = k_cache[blocks].flatten(0, 1)[: position + 1].float().repeat_interleave(group, dim=1)
        values = v_cache[blocks].flatten(0, 1)[: position + 1].float().repeat_interleave(group, dim=1)
        scores = torch.einsum("hd,phd->hp", q[token].float(), keys) * scale
        out[token] = torch.einsum("hp,phd->hd", scores.softmax(-1), values)
    return out


def store_kv(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    """See experts.kernels.store_kv."""
    block_size = cache.shape[1]
    cache[slots // block_size, slots % block_size] = rows
