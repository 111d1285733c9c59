"""The gate picks the same experts as transformers' routers, with the same weights up to the order of one sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from experts import kernels
from experts.kernels import reference
from experts.spec import GateSpec
from router.model.families import model_spec
from router.model.spec import MoESpec
from tests import tiny
from tests.kernel_variants import few, values, variant

__all__ = ["variant"]

ROUTERS = {
    "deepseek_v3": "deepseek_v3.modeling_deepseek_v3.DeepseekV3TopkRouter",
    "deepseek_v2": "deepseek_v2.modeling_deepseek_v2.DeepseekV2TopkRouter",
    "deepseek_v2_grouped": "deepseek_v2.modeling_deepseek_v2.DeepseekV2TopkRouter",
    "glm4_moe": "glm4_moe.modeling_glm4_moe.Glm4MoeTopkRouter",
    "qwen3_moe": "qwen3_moe.modeling_qwen3_moe.Qwen3MoeTopKRouter",
    "qwen3_moe_sparse": "qwen3_moe.modeling_qwen3_moe.Qwen3MoeTopKRouter",
    "mixtral": "mixtral.modeling_mixtral.MixtralTopKRouter",
    "olmoe": "olmoe.modeling_olmoe.OlmoeTopKRouter",
}


def gate_spec(config: Any) -> GateSpec:
    return next(layer.gate for layer in model_spec(config.to_dict()).layers if isinstance(layer, MoESpec))


@pytest.mark.parametrize("gate", [kernels.gate, reference.gate], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(ROUTERS))
def test_the_choice_is_transformers_choice(family: str, dtype: torch.dtype, gate: Callable[..., Any]) -> None:
    name, values = tiny.FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(architectures=[f"{name}ForCausalLM"], **(tiny.COMMON | values))
    module, _, router_class = ROUTERS[family].rpartition(".")
    router = getattr(__import__(f"transformers.models.{module}", fromlist=["_"]), router_class)(config)
    torch.manual_seed(1)
    tiny.widen(router)
    router = router.to(dtype)
    bias = getattr(router, "e_score_correction_bias", None)
    if bias is not None:
        bias.data = torch.randn(len(bias)) * 0.1
    with torch.no_grad():
        logits, weights, ids = router(torch.randn(50, tiny.COMMON["hidden_size"]).to(dtype))
    spec = gate_spec(config)
    our_ids, our_weights = gate(logits.view(50, -1).float(), spec, bias)
    theirs = torch.zeros(50, logits.shape[-1]).scatter_(1, ids, weights.float())
    ours = torch.zeros(50, logits.shape[-1]).scatter_(1, our_ids.long(), our_weights)
    distinct = torch.tensor([len(set(row.tolist())) == len(row) for row in logits.view(50, -1)])
    ours, theirs = ours[distinct], theirs[distinct]  # on ties, which bfloat16 has, torch takes any
    assert torch.equal(ours != 0, theirs != 0)
    rounded = dtype is torch.bfloat16 and not spec.float32_weights
    torch.testing.assert_close(ours, theirs, rtol=4e-3 if rounded else 1e-6, atol=0)


@settings(deadline=None, max_examples=40)
@given(groups=st.integers(1, 4), kept=st.integers(1, 4), per_group=st.integers(2, 5), seed=st.integers(0, 2**31))
def test_no_expert_outside_the_best_groups_is_chosen(groups: int, kept: int, per_group: int, seed: int) -> None:
    kept = min(kept, groups)
    spec = GateSpec(
        num_experts=groups * per_group, top_k=kept * per_group, score="sigmoid", float32_logits=True,
        float32_weights=True, num_groups=groups, topk_groups=kept, group_score="top2sum", normalise=True,
    )  # fmt: skip
    logits = torch.randn(5, spec.num_experts, generator=torch.Generator().manual_seed(seed))
    ids, weights = kernels.gate(logits, spec)
    assert all(len(set(row.div(per_group, rounding_mode="floor").tolist())) == kept for row in ids)
    assert torch.allclose(weights.sum(dim=-1), torch.ones(5))


@st.composite
def specs(draw: st.DrawFn) -> GateSpec:
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(2, 11))
    kept = draw(st.integers(1, groups))
    return GateSpec(
        num_experts=groups * per_group,
        top_k=draw(st.integers(1, kept * per_group)),
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        float32_logits=True,
        float32_weights=True,
        num_groups=groups,
        topk_groups=kept,
        group_score=draw(st.sampled_from(["max", "top2sum"])),
        masked_value=draw(st.sampled_from([float("-inf"), 0.0])),
        normalise=draw(st.booleans()),
        norm_eps=draw(st.sampled_from([0.0, 1e-20])),
        scale=draw(st.sampled_from([1.0, 2.5])),
    )


@few
@given(spec=specs(), biased=st.booleans(), seed=st.integers(0, 999))
def test_the_kernel_is_its_reference(variant: str, spec: GateSpec, biased: bool, seed: int) -> None:
    logits = values(7, spec.num_experts, seed=seed)
    bias = values(spec.num_experts, seed=seed + 1).abs() if biased else None  # positive: a masked 0 is never the best
    ids, weights = kernels.gate(logits, spec, bias)
    expected_ids, expected_weights = reference.gate(logits, spec, bias)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=0)


@few
@given(spec=specs(), rows=st.integers(2, 40), seed=st.integers(0, 999))
def test_a_tokens_choice_is_the_same_bytes_alone(variant: str, spec: GateSpec, rows: int, seed: int) -> None:
    logits = values(rows, spec.num_experts, seed=seed)
    ids, weights = kernels.gate(logits, spec)
    for row in range(rows):
        alone_ids, alone_weights = kernels.gate(logits[row : row + 1].clone(), spec)
        assert torch.equal(alone_ids[0], ids[row])
        assert torch.equal(alone_weights[0], weights[row])


@few
@given(num_experts=st.integers(1, 40), top_k=st.integers(1, 40), levels=st.integers(1, 6), seed=st.integers(0, 999))
def test_of_equal_experts_those_of_torch_topk_are_chosen(
    variant: str, num_experts: int, top_k: int, levels: int, seed: int
) -> None:
    spec = GateSpec(
        num_experts=num_experts, top_k=min(top_k, num_experts), score="sigmoid", float32_logits=True,
        float32_weights=True,
    )  # fmt: skip
    logits = (values(9, num_experts, seed=seed) * levels).round()
    ids, _ = kernels.gate(logits, spec)
    expected = logits.sigmoid().topk(spec.top_k, sorted=False).indices
    assert torch.equal(ids.sort().values, expected.int().sort().values)
