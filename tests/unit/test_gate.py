"""The gate picks the same experts as transformers' routers, with the same weights up to the order of one sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from router.model.families import model_spec
from router.model.gate import choose
from router.model.spec import GateSpec, MoESpec
from tests import tiny

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(ROUTERS))
def test_the_choice_is_transformers_choice(family: str, dtype: torch.dtype) -> None:
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
    our_ids, our_weights = choose(logits.view(50, -1), gate_spec(config), bias)
    theirs = torch.zeros(50, logits.shape[-1]).scatter_(1, ids, weights.float())
    ours = torch.zeros(50, logits.shape[-1]).scatter_(1, our_ids.long(), our_weights)
    assert torch.equal(ours != 0, theirs != 0)
    torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=0)  # they sum the top-k in no particular order


@settings(deadline=None, max_examples=40)
@given(groups=st.integers(1, 4), kept=st.integers(1, 4), per_group=st.integers(2, 5), seed=st.integers(0, 2**31))
def test_no_expert_outside_the_best_groups_is_chosen(groups: int, kept: int, per_group: int, seed: int) -> None:
    kept = min(kept, groups)
    spec = GateSpec(
        num_experts=groups * per_group, top_k=kept * per_group, score="sigmoid", float32_logits=True,
        float32_weights=True, num_groups=groups, topk_groups=kept, group_score="top2sum", normalise=True,
    )  # fmt: skip
    logits = torch.randn(5, spec.num_experts, generator=torch.Generator().manual_seed(seed))
    ids, weights = choose(logits, spec)
    assert all(len(set(row.div(per_group, rounding_mode="floor").tolist())) == kept for row in ids)
    assert torch.allclose(weights.sum(dim=-1), torch.ones(5))
