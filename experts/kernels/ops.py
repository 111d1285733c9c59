"""The kernels as functions on torch tensors. See the package's docstring for the law that they all keep."""

from __future__ import annotations

import torch
from torch import Tensor

from experts.kernels import reference
from experts.kernels.dtypes import DTYPES
from experts.kernels.expert_table import ExpertTable
from experts.kernels.library import current, gate_parameters
from experts.kernels.weight import Weight, address_of_weight, code_of, fits_rows
from experts.spec import GateSpec


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x weight^T + bias, summed in float32 and rounded once. The weight is read in place, at any alignment.

    x: [n, in]; weight: [out, in]; bias: [out]; float32 or bfloat16, all of one dtype, rows contiguous; or the weight is
    float16 and the others float32, with the bytes that the same weight in float32 would give; or the weight is of few
    bits, beside rows of either dtype.
    out: [n, out] to write to. out_dtype: x's dtype unless given (float32 for logits). Returns [n, out].
    """
    functions = current()
    if functions is None:
        return reference.linear(x, weight, bias, out=out, out_dtype=out_dtype)
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    dtype = x.dtype
    if out is None:
        out = torch.empty((num_rows, out_features), dtype=out_dtype or dtype)
    assert fits_rows(weight, dtype)
    assert weight.shape[1] == in_features
    assert x.stride(1) == out.stride(1) == 1
    assert not isinstance(weight, Tensor) or weight.stride(1) == 1
    assert out.shape == (num_rows, out_features)
    assert bias is None or (bias.dtype is dtype and bias.is_contiguous() and bias.shape[0] == out_features)
    functions.bk_linear(
        x.data_ptr(),
        x.stride(0),
        address_of_weight(weight),
        weight.stride(0) if isinstance(weight, Tensor) else 0,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        num_rows,
        in_features,
        out_features,
        code_of(weight),
        DTYPES[dtype],
        DTYPES[out.dtype],
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None) -> Tensor:
    """weight * round(x / sqrt(mean(x^2) + eps)), in float32 up to the rounding, as transformers' LlamaRMSNorm.

    x: [n, width]; weight: [width]; one dtype. With residual [n, width]: first residual += x in place, and that is
    normalised. Returns [n, width].
    """
    functions = current()
    if functions is None:
        return reference.rms_norm(x, weight, eps, residual=residual)
    num_rows, width = x.shape
    out = torch.empty((num_rows, width), dtype=x.dtype)
    assert weight.dtype is x.dtype
    assert weight.shape[0] == width
    assert x.stride(1) == weight.stride(0) == 1
    assert residual is None or (residual.dtype is x.dtype and residual.shape == x.shape and residual.stride(1) == 1)
    functions.bk_rms_norm(
        x.data_ptr(),
        x.stride(0),
        None if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        weight.data_ptr(),
        eps,
        out.data_ptr(),
        num_rows,
        width,
        DTYPES[x.dtype],
    )
    return out


def add_norm(update: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += update (or None), in place; its rms_norm. update, residual: [n, width]. Returns [n, width]."""
    if update is None:
        return rms_norm(residual, weight, eps)
    return rms_norm(update, weight, eps, residual=residual)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """round(silu(gate)) * up.

    gate, up: [n, width], rows contiguous, one dtype; halves of one buffer do. Returns [n, width].
    """
    functions = current()
    if functions is None:
        return reference.silu_mul(gate, up)
    num_rows, width = gate.shape
    out = torch.empty((num_rows, width), dtype=gate.dtype)
    assert up.dtype is gate.dtype
    assert up.shape == gate.shape
    assert gate.stride(1) == up.stride(1) == 1
    functions.bk_silu_mul(
        gate.data_ptr(),
        gate.stride(0),
        up.data_ptr(),
        up.stride(0),
        out.data_ptr(),
        num_rows,
        width,
        DTYPES[gate.dtype],
    )
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding, in place, of the first 2 * half values of each head; rounded once. Returns x.

    x: [n, heads, dim], heads contiguous; cos, sin: [n, half] float32, contiguous. Pairs are (i, i + half), or
    (2i, 2i + 1) if interleaved; they stay where they are.
    """
    functions = current()
    if functions is None:
        return reference.rope(x, cos, sin, interleaved)
    num_rows, heads, dim = x.shape
    half = cos.shape[1]
    assert 2 * half <= dim
    assert x.stride(2) == 1
    assert cos.shape == sin.shape == (num_rows, half)
    assert cos.dtype is sin.dtype is torch.float32
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    functions.bk_rope(
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        cos.data_ptr(),
        sin.data_ptr(),
        num_rows,
        heads,
        half,
        interleaved,
        DTYPES[x.dtype],
    )
    return x


def gate(router_logits: Tensor, spec: GateSpec, select_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each token's top-k experts and their weights, in the order of operations of the families' routers (GateSpec).

    router_logits: [n, num_experts] float32, contiguous; select_bias: [num_experts] float32.
    Returns topk_ids [n, top_k] int32, best first, and topk_weights [n, top_k] float32. Of equal experts at the end of
    the top-k those are chosen that torch.topk chooses.
    """
    functions = current()
    if functions is None:
        return reference.gate(router_logits, spec, select_bias)
    num_tokens = router_logits.shape[0]
    topk_ids = torch.empty((num_tokens, spec.top_k), dtype=torch.int32)
    topk_weights = torch.empty((num_tokens, spec.top_k), dtype=torch.float32)
    assert router_logits.dtype is torch.float32
    assert router_logits.shape[1] == spec.num_experts
    assert router_logits.is_contiguous()
    assert select_bias is None or (select_bias.dtype is torch.float32 and select_bias.shape == (spec.num_experts,))
    functions.bk_gate(
        router_logits.data_ptr(),
        None if select_bias is None else select_bias.data_ptr(),
        gate_parameters(spec),
        topk_ids.data_ptr(),
        topk_weights.data_ptr(),
        num_tokens,
    )
    return topk_ids, topk_weights


def moe(hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: ExpertTable) -> tuple[Tensor, Tensor]:
    """The routed experts of one layer: the weighted sum of each token's expert rows.

    hidden_states: [n, hidden] in the table's dtype; topk_ids: [n, k] int32, -1 for none;
    topk_weights: [n, k] float32; both contiguous.
    An expert computes down(silu(gate(x)) * up(x)), rounding to the dtype after each step; its row is weighted and added
    in float32 in top-k order, and the sum is rounded once.
    Returns rows [n, hidden] and failed [n] bool: a row in which anything is not finite is zeros.
    Raises KeyError when an id is out of range or names an expert that the table does not hold.
    """
    functions = current()
    if functions is None:
        return reference.moe(hidden_states, topk_ids, topk_weights, experts)
    num_tokens, hidden_size = hidden_states.shape
    rows = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    failed = torch.empty(num_tokens, dtype=torch.bool)
    assert hidden_states.dtype is experts.dtype
    assert hidden_states.stride(1) == 1
    assert hidden_size == experts.hidden_size
    assert topk_ids.dtype is torch.int32
    assert topk_weights.dtype is torch.float32
    assert topk_ids.shape == topk_weights.shape
    assert topk_ids.is_contiguous()
    assert topk_weights.is_contiguous()
    status = functions.bk_moe(
        hidden_states.data_ptr(),
        hidden_states.stride(0),
        topk_ids.data_ptr(),
        topk_weights.data_ptr(),
        experts.gate,
        experts.up,
        experts.down,
        rows.data_ptr(),
        failed.data_ptr(),
        num_tokens,
        topk_ids.shape[1],
        experts.num_experts,
        hidden_size,
        experts.intermediate_size,
        experts.code,
        DTYPES[experts.dtype],
    )
    if status != 0:
        raise experts.not_held_error(topk_ids)
    return rows, failed


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
    """Paged causal attention: row t attends to positions 0..positions[t] of sequence seq_ids[t]. Decode and prefill.

    q: [n, query_heads, key_dim] contiguous; k_cache: [num_blocks, block_size, kv_heads, key_dim]; v_cache:
    [num_blocks, block_size, kv_heads, value_dim]; one dtype; the caches may be strided views, as of one latent cache.
    block_tables: [num_seqs, max_blocks] int32; seq_ids, positions: [n] int32; contiguous. Query head h reads kv head
    h // (query_heads / kv_heads). Neighbouring rows of one sequence share their reads, so keep them together.
    Returns [n, query_heads, value_dim] in q's dtype.
    """
    functions = current()
    if functions is None:
        return reference.attention(q, k_cache, v_cache, block_tables, seq_ids, positions, scale, block_size=block_size)
    num_rows, query_heads, key_dim = q.shape
    kv_heads, value_dim = v_cache.shape[2:]
    out = torch.empty((num_rows, query_heads, value_dim), dtype=q.dtype)
    assert k_cache.dtype is v_cache.dtype is q.dtype
    assert k_cache.shape[1:] == (block_size, kv_heads, key_dim)
    assert query_heads % kv_heads == 0
    assert q.is_contiguous()
    assert k_cache.stride(3) == v_cache.stride(3) == 1
    assert block_tables.dtype is seq_ids.dtype is positions.dtype is torch.int32
    assert block_tables.is_contiguous()
    functions.bk_attention(
        q.data_ptr(),
        k_cache.data_ptr(),
        *k_cache.stride()[:3],
        v_cache.data_ptr(),
        *v_cache.stride()[:3],
        block_tables.data_ptr(),
        block_tables.shape[1],
        seq_ids.data_ptr(),
        positions.data_ptr(),
        scale,
        out.data_ptr(),
        num_rows,
        query_heads,
        kv_heads,
        key_dim,
        value_dim,
        block_size,
        DTYPES[q.dtype],
    )
    return out


def store_kv(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    """Write rows to slots (block * block_size + offset) of a paged cache.

    cache: [num_blocks, block_size, heads, dim]; rows: [n, heads, dim]; one dtype, each row's heads side by side;
    slots: [n] int32, distinct.
    """
    functions = current()
    if functions is None:
        reference.store_kv(cache, rows, slots)
        return
    num_rows, heads, dim = rows.shape
    size = cache.element_size()
    assert rows.dtype is cache.dtype
    assert cache.shape[2:] == (heads, dim)
    assert rows.stride(2) == cache.stride(3) == 1
    assert heads == 1 or rows.stride(1) == cache.stride(2) == dim
    assert slots.dtype is torch.int32
    functions.bk_store_kv(
        cache.data_ptr(),
        cache.stride(0) * size,
        cache.stride(1) * size,
        cache.shape[1],
        rows.data_ptr(),
        rows.stride(0) * size,
        slots.data_ptr(),
        num_rows,
        heads * dim * size,
    )
