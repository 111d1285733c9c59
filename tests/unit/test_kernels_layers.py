"""A half of a layer in one call is, to the byte, its kernels called one after another, in every variant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from experts import kernels
from experts.formats import INT8
from experts.kernels import library
from experts.kernels.gate_layer import choose_in_steps
from experts.kernels.gqa import GQALayer, GQAParts, gqa_in_steps
from experts.kernels.mla import MLALayer, MLAParts, mla_in_steps
from experts.kernels.step_rows import StepRows
from experts.spec import GateSpec
from tests.kernel_variants import DTYPES, close, few, values, variant  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("variant")

BLOCK_SIZE, LAYERS = 4, 2


def matrix(out: int, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    return (values(out, size, seed=seed) * size**-0.5).to(dtype)


def vector(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    return (1 + 0.1 * values(size, seed=seed)).to(dtype)


def gqa_parts(dtype: torch.dtype, *, hidden: int = 40, index: int = 1, **changes: Any) -> GQAParts:
    heads, kv_heads, dim = changes.get("num_heads", 6), changes.get("num_kv_heads", 2), changes.get("head_dim", 12)
    q_size, kv_size = heads * dim, kv_heads * dim
    bias, qk_norm = changes.pop("bias", False), changes.get("qk_norm", "none")
    norm_sizes = {"none": None, "per_head": (dim, dim), "full": (q_size, kv_size)}[qk_norm]
    sizes = {"q": q_size, "k": kv_size, "v": kv_size, "o": hidden}
    biases = {f"{name}_bias": values(size, dtype=dtype, seed=size) for name, size in sizes.items() if bias}
    defaults: dict[str, Any] = {
        "index": index,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": dim,
        "scale": dim**-0.5,
        "eps": 1e-6,
        "interleaved": False,
        "qk_norm": qk_norm,
        "clip": None,
        "attention_norm": vector(hidden, dtype, 1),
        "ffn_norm": vector(hidden, dtype, 2),
        "q": matrix(q_size, hidden, dtype, 3),
        "k": matrix(kv_size, hidden, dtype, 4),
        "v": matrix(kv_size, hidden, dtype, 5),
        "o": matrix(hidden, q_size, dtype, 6),
        "q_norm": vector(norm_sizes[0], dtype, 7) if norm_sizes else None,
        "k_norm": vector(norm_sizes[1], dtype, 8) if norm_sizes else None,
    }
    return GQAParts(**(defaults | biases | changes))


def mla_parts(dtype: torch.dtype, *, low: bool, bias: bool, interleaved: bool, heads: int = 3) -> MLAParts:
    hidden, rank, nope, rope, v, q_rank = 40, 24, 10, 8, 14, 20
    return MLAParts(
        index=1,
        kv_lora_rank=rank,
        nope_head_dim=nope,
        rope_head_dim=rope,
        v_head_dim=v,
        scale=(nope + rope) ** -0.5,
        eps=1e-5,
        latent_eps=1e-6,
        interleaved=interleaved,
        attention_norm=vector(hidden, dtype, 1),
        ffn_norm=vector(hidden, dtype, 2),
        q_a=matrix(q_rank, hidden, dtype, 3) if low else None,
        q_b=matrix(heads * (nope + rope), q_rank if low else hidden, dtype, 4),
        kv_a=matrix(rank + rope, hidden, dtype, 5),
        uk=[matrix(rank, nope, dtype, 10 + h) for h in range(heads)],
        uv=[matrix(v, rank, dtype, 20 + h) for h in range(heads)],
        o=matrix(hidden, heads * v, dtype, 6),
        kv_a_norm=vector(rank, dtype, 7),
        q_a_norm=vector(q_rank, dtype, 8) if low else None,
        q_a_bias=values(q_rank, dtype=dtype, seed=9) if low and bias else None,
        kv_a_bias=values(rank + rope, dtype=dtype, seed=10) if bias else None,
        o_bias=values(hidden, dtype=dtype, seed=11) if bias else None,
    )


def some_step(layer: GQAParts | MLAParts, lengths: list[tuple[int, int]]) -> StepRows:
    """A step of sequences with so many positions before, and so many rows; a cache of random contents."""
    dtype, hidden = layer.attention_norm.dtype, len(layer.attention_norm)
    if isinstance(layer, GQAParts):
        planes, heads, dim, half = 2, layer.num_kv_heads, layer.head_dim, layer.head_dim // 4
    else:
        planes, heads, dim, half = 1, 1, layer.kv_lora_rank + layer.rope_head_dim, layer.rope_head_dim // 2
    blocks = -(-max(before + rows for before, rows in lengths) // BLOCK_SIZE)
    order = torch.randperm(len(lengths) * blocks, generator=torch.Generator().manual_seed(5))
    tables = order.view(len(lengths), blocks).to(torch.int32)
    seq_ids = [seq for seq, (_, rows) in enumerate(lengths) for _ in range(rows)]
    positions = [before + row for before, rows in lengths for row in range(rows)]
    slots = [
        int(tables[s, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for s, p in zip(seq_ids, positions, strict=True)
    ]
    angles = values(len(positions), half, seed=3)
    return StepRows(
        values(len(positions), hidden, dtype=dtype, seed=4),
        values(LAYERS, planes, len(order), BLOCK_SIZE, heads, dim, dtype=dtype, seed=6),
        angles.cos(),
        angles.sin(),
        slots=torch.tensor(slots, dtype=torch.int32),
        seq_ids=torch.tensor(seq_ids, dtype=torch.int32),
        positions=torch.tensor(positions, dtype=torch.int32),
        block_tables=tables,
    )


def outcome(call: Any, parts: GQAParts | MLAParts, lengths: list[tuple[int, int]], update: bool = True) -> list[Tensor]:
    """x, the residual and the cache after one call on a step made anew."""
    step = some_step(parts, lengths)
    added = values(*step.residual.shape, dtype=step.residual.dtype, seed=12) if update else None
    return [call(added, step), step.residual, step.cache]


def same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


LENGTHS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), min_size=1, max_size=4)


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(
    lengths=LENGTHS,
    update=st.booleans(),
    bias=st.booleans(),
    qk_norm=st.sampled_from(["none", "per_head", "full"]),
    clip=st.sampled_from([None, 0.3]),
    interleaved=st.booleans(),
)
def test_grouped_query_attention_in_one_call_is_its_steps(dtype, lengths, update, bias, qk_norm, clip, interleaved):
    parts = gqa_parts(dtype, bias=bias, qk_norm=qk_norm, clip=clip, interleaved=interleaved)
    expected = outcome(lambda u, s: gqa_in_steps(parts, u, s), parts, lengths, update)
    assert same(outcome(GQALayer(parts), parts, lengths, update), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(lengths=LENGTHS, update=st.booleans(), low=st.booleans(), bias=st.booleans(), interleaved=st.booleans())
def test_latent_attention_in_one_call_is_its_steps(dtype, lengths, update, low, bias, interleaved):
    parts = mla_parts(dtype, low=low, bias=bias, interleaved=interleaved)
    expected = outcome(lambda u, s: mla_in_steps(parts, u, s), parts, lengths, update)
    assert same(outcome(MLALayer(parts), parts, lengths, update), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sizes_that_are_worth_the_threads_change_nothing(threads):
    lengths = [(0, 130), (70, 1), (5, 1)]
    wide = gqa_parts(torch.bfloat16, hidden=256, num_heads=8, num_kv_heads=4, head_dim=32)
    heads = mla_parts(torch.bfloat16, low=True, bias=True, interleaved=True, heads=40)
    kernels.set_num_threads(threads)
    for parts, layer, in_steps in ((wide, GQALayer, gqa_in_steps), (heads, MLALayer, mla_in_steps)):
        expected = outcome(lambda u, s, parts=parts, call=in_steps: call(parts, u, s), parts, lengths)
        assert same(outcome(layer(parts), parts, lengths), expected)
    kernels.set_num_threads(2)


def test_weights_of_few_bits_stand_beside_plain_ones():
    parts = gqa_parts(torch.bfloat16, hidden=64)
    packed = {
        name: kernels.TiledWeight(INT8, tuple(weight.shape), kernels.encode(INT8, weight))
        for name, weight in (("q", parts.q), ("v", parts.v))
    }
    parts = gqa_parts(torch.bfloat16, hidden=64, **packed)
    expected = outcome(lambda u, s: gqa_in_steps(parts, u, s), parts, [(9, 3), (0, 5)])
    assert same(outcome(GQALayer(parts), parts, [(9, 3), (0, 5)]), expected)


@pytest.mark.parametrize("family", ["gqa", "mla"])
def test_without_compiled_kernels_torch_computes_the_same_up_to_rounding(family):
    if family == "gqa":
        parts = gqa_parts(torch.float32, bias=True, qk_norm="full", clip=0.9)
        layer = GQALayer(parts)
    else:
        parts = mla_parts(torch.float32, low=True, bias=True, interleaved=False)
        layer = MLALayer(parts)
    compiled = outcome(layer, parts, [(9, 3), (0, 5)])
    here = library._library
    library.use(None)
    try:
        by_torch = outcome(layer, parts, [(9, 3), (0, 5)])
    finally:
        library.use(here)
    for a, b in zip(compiled, by_torch, strict=True):
        close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(
    n=st.integers(1, 40),
    float32_logits=st.booleans(),
    float32_weights=st.booleans(),
    bias=st.booleans(),
    score=st.sampled_from(["softmax", "sigmoid"]),
)
def test_a_gate_in_one_call_is_its_steps(dtype, n, float32_logits, float32_weights, bias, score):
    spec = GateSpec(
        num_experts=19,
        top_k=5,
        score=score,
        float32_logits=float32_logits,
        float32_weights=float32_weights,
        select_bias=bias,
        normalise=True,
        scale=2.5,
    )
    weight = matrix(19, 70, torch.float32 if float32_logits else dtype, 1)
    gate = kernels.GateLayer(spec, weight, values(19, seed=2) if bias else None, dtype)
    x = values(n, 70, dtype=dtype, seed=3)
    assert same(list(gate(x)), list(choose_in_steps(gate, x)))


def test_a_struct_of_another_size_is_refused():
    parts = gqa_parts(torch.float32)
    layer = GQALayer(parts)
    layer._struct.size -= 8
    with pytest.raises(AssertionError):
        outcome(layer, parts, [(0, 1)])
