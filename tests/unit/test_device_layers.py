"""Gates and dense models on a device, in both dtypes, against the CPU's kernels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts import kernels
from experts.checkpoint import open_checkpoint
from experts.device.stacks import PlainStack
from experts.spec import GateSpec
from router.model.device.layers import DeviceGate
from router.model.load import load_model
from tests import packable, tiny
from tests.device_models import device_model
from tests.forced import logits_of

NUM_EXPERTS, HIDDEN = 12, 16

GATES = st.builds(
    GateSpec,
    num_experts=st.just(NUM_EXPERTS),
    top_k=st.integers(1, 4),
    score=st.sampled_from(["softmax", "sigmoid"]),
    float32_logits=st.booleans(),
    float32_weights=st.booleans(),
    select_bias=st.booleans(),
    num_groups=st.sampled_from([1, 3]),
    topk_groups=st.just(1),
    group_score=st.sampled_from(["max", "top2sum"]),
    masked_value=st.sampled_from([float("-inf"), 0.0]),
    normalise=st.booleans(),
    norm_eps=st.sampled_from([0.0, 1e-20]),
    scale=st.sampled_from([1.0, 2.5]),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=80, deadline=None)
@given(spec=GATES, seed=st.integers(0, 99))
def test_every_gate_chooses_and_weighs_as_the_cpus(dtype: torch.dtype, spec: GateSpec, seed: int) -> None:
    """On logits that no order of summation changes, because flips of the choice are no error of the gate."""
    spec = dataclasses.replace(spec, topk_groups=min(2, spec.num_groups))
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randint(-1, 2, (7, HIDDEN), generator=generator).to(dtype)
    weight = (torch.randint(-4, 5, (NUM_EXPERTS, HIDDEN), generator=generator) / 16).to(dtype)
    weight = weight.float() if spec.float32_logits else weight
    bias = torch.rand(NUM_EXPERTS, generator=generator) if spec.select_bias else None
    wanted = kernels.GateLayer(spec, weight, bias, dtype)(hidden_states)
    ours = DeviceGate(spec, weight, bias)(hidden_states)
    by_expert = [torch.zeros(7, NUM_EXPERTS).scatter_(1, ids.long(), weights) for ids, weights in (ours, wanted)]
    assert ours[0].dtype is torch.int32
    torch.testing.assert_close(*by_expert, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "llama_bias", "qwen2", "qwen3"])
def test_in_bfloat16_logits_differ_by_rounding_alone(family: str, tmp_path: Path) -> None:
    """Of dense models, where no choice of experts flips."""
    tiny.make(family, tmp_path)
    prompts, forced = [[3, 17, 90, 41, 5, 77, 6, 2, 30], [9, 8, 7]], [[50, 60], [11, 12]]
    models = device_model(tmp_path, torch.bfloat16), load_model(open_checkpoint(tmp_path), torch.bfloat16)
    ours, wanted = (torch.cat(logits_of(model, prompts, forced, 8)) for model in models)
    assert ours.dtype is torch.float32
    assert (ours - wanted).norm() / wanted.norm() < 0.02


def test_experts_in_fp8_give_the_logits_of_what_fp8_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packable.own_cache(tmp_path / "cache", monkeypatch)
    directory = packable.make("deepseek_v3", tmp_path / "model")
    prompts, forced = [[3, 17, 90, 41, 5, 77, 6, 2, 30], [9, 8, 7]], [[50, 60], [11, 12]]
    held = device_model(directory, weight_format="fp8")
    ours = torch.cat(logits_of(held, prompts, forced, 8))
    monkeypatch.setattr("experts.device.stacks.Fp8Stack", PlainStack)
    wanted = torch.cat(logits_of(device_model(directory, weight_format="fp8"), prompts, forced, 8))
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=2e-5)
    exact = torch.cat(logits_of(device_model(directory), prompts, forced, 8))
    assert not torch.allclose(ours, exact, rtol=1e-4, atol=2e-5)
