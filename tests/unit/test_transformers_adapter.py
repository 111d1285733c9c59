"""A transformers model gives the same answers with its routed experts in the pool."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
import transformers

from barista.errors import BaristaError, CheckpointError, ConfigError
from experts.adapters.transformers import PooledExperts, RowsFailed, connect, load_without_experts
from experts.adapters.transformers_model import expert_model
from experts.checkpoint import open_checkpoint
from experts.formats import Holding
from experts.pool import DispatchBatch, ExpertPool
from router.model.expert_model import expert_model as routers_expert_model
from router.model.load import load_model
from tests.tiny import FAMILIES, make

PROMPTS = torch.tensor([[5, 17, 3, 99, 42, 8], [2, 2, 7, 23, 64, 11]])
MASK = (PROMPTS != 2).long()
WITH_EXPERTS = [name for name, (_, values) in FAMILIES.items() if "num_experts_per_tok" in values]


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.disable_progress_bar()


def local_pool(path: Path, dtype: torch.dtype = torch.float32) -> ExpertPool:
    pool = load_model(open_checkpoint(path), dtype).pool
    assert pool is not None
    return pool


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(PROMPTS, attention_mask=MASK).logits


def greedy(model: transformers.PreTrainedModel) -> list[list[int]]:
    return model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=12, do_sample=False).tolist()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral", "qwen3_moe_sparse"])
def test_logits_and_text_are_those_of_transformers_own_experts(family, tmp_path):
    model = make(family, tmp_path)
    model.set_experts_implementation("eager")
    own, own_text = logits(model), greedy(model)
    pool = local_pool(tmp_path)
    with PooledExperts(model, pool):
        pooled, pooled_text = logits(model), greedy(model)
    assert pool.expert_tokens.sum() > 0
    torch.testing.assert_close(pooled, own, rtol=0, atol=1e-5 * float(own.abs().max()))
    assert pooled_text == own_text


def test_bfloat16_rows_stay_bfloat16(tmp_path):
    make("qwen3_moe", tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    own = logits(model)
    with PooledExperts(model, local_pool(tmp_path, torch.bfloat16)):
        pooled = logits(model)
    assert pooled.dtype is torch.bfloat16
    error = (pooled - own).float().norm() / own.float().norm()
    assert error < 0.02


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_the_pool_is_told_of_the_same_experts_as_by_the_router(family, tmp_path):
    model = make(family, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert expert_model(model, checkpoint) == routers_expert_model(checkpoint, Holding("float32"))


def test_after_close_the_model_is_as_before(tmp_path):
    model = make("mixtral", tmp_path)
    before, implementation = logits(model), model.get_experts_implementation()
    pooled = PooledExperts(model, local_pool(tmp_path))
    with pytest.raises(ConfigError, match="already"):
        PooledExperts(model, local_pool(tmp_path))
    pooled.close()
    pooled.close()
    assert model.get_experts_implementation() == implementation
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral"])
def test_a_model_needs_no_experts_of_its_own(family, tmp_path):
    whole = make(family, tmp_path)
    pool = local_pool(tmp_path)
    trunk = load_without_experts(tmp_path, dtype=torch.float32)
    assert type(trunk) is type(whole)
    own = {name for name, _ in whole.named_parameters() if ".experts." in name}
    assert own
    assert {name for name, _ in whole.named_parameters()} - {name for name, _ in trunk.named_parameters()} == own
    with PooledExperts(whole, pool) as pooled:
        expected = logits(whole)
        weights = weakref.ref(whole.model.layers[1].mlp.experts.gate_up_proj)
        pooled.release_weights()
        gc.collect()
        assert weights() is None
        assert torch.equal(logits(whole), expected)
    with PooledExperts(trunk, pool):
        assert torch.equal(logits(trunk), expected)


class Recorder:
    """A transport that answers with zeros, and says that some rows have failed. calls: (step, layer)."""

    def __init__(self, failing_layer: int = -1) -> None:
        self.calls: list[tuple[int, int]] = []
        self.failing_layer = failing_layer

    def dispatch(self, batch: DispatchBatch) -> DispatchBatch:
        self.calls.append((batch.step, batch.layer))
        return batch

    def combine(self, ticket: DispatchBatch) -> tuple[torch.Tensor, torch.Tensor]:
        failed = torch.zeros(len(ticket.hidden_states), dtype=torch.bool)
        failed[[3, 5]] = ticket.layer == self.failing_layer
        return torch.zeros_like(ticket.hidden_states), failed


def test_every_forward_is_a_step_of_its_own(tmp_path):
    model = make("deepseek_v3", tmp_path)  # layer 0 is dense
    transport = Recorder()
    with PooledExperts(model, ExpertPool(transport, 3, 16)):
        logits(model)
        logits(model)
    first = transport.calls[0][0]
    assert transport.calls == [(first, 1), (first, 2), (first + 1, 1), (first + 1, 2)]


def test_failed_rows_are_an_error_that_names_them(tmp_path):
    model = make("qwen3_moe", tmp_path)
    with (
        PooledExperts(model, ExpertPool(Recorder(failing_layer=2), 3, 10)),
        pytest.raises(RowsFailed, match=r"Layer 2: .* 2 of 12 rows \(3, 5\)"),
    ):
        logits(model)


def test_gradients_are_refused_rather_than_lost(tmp_path):
    model = make("qwen3_moe", tmp_path)
    with PooledExperts(model, local_pool(tmp_path)), pytest.raises(BaristaError, match=r"no gradients.*inference_mode"):
        model(PROMPTS)


def test_a_model_that_no_pool_serves_says_so(tmp_path):
    make("qwen3_moe", tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="barista")
    with pytest.raises(ConfigError, match="no pool serves it"):
        logits(model)


def gpt_oss() -> transformers.PreTrainedModel:
    sizes = {"vocab_size": 131, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16, "num_local_experts": 4}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, **heads, pad_token_id=2))


def test_experts_that_the_pool_cannot_compute_are_refused(tmp_path):
    pool = ExpertPool(Recorder(), 3, 4)
    with pytest.raises(ConfigError, match="is not down"):
        PooledExperts(gpt_oss(), pool)
    with pytest.raises(ConfigError, match="has no experts"):
        PooledExperts(make("llama", tmp_path / "llama"), pool)
    with pytest.raises(ConfigError, match="float16"):
        PooledExperts(make("mixtral", tmp_path / "mixtral").half(), pool)


def test_another_activation_is_refused(tmp_path):
    model = make("mixtral", tmp_path, hidden_act="gelu")
    with pytest.raises(ConfigError, match="is not down"):
        PooledExperts(model, ExpertPool(Recorder(), 3, 6))


def test_a_class_that_keeps_its_own_experts_is_refused(tmp_path, monkeypatch):
    model = make("mixtral", tmp_path)
    monkeypatch.setattr(type(model), "_can_set_experts_implementation", classmethod(lambda cls: False))
    with pytest.raises(ConfigError, match="does not let MixtralForCausalLM"):
        PooledExperts(model, ExpertPool(Recorder(), 3, 6))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model = make("mixtral", tmp_path / "mixtral")
    make("qwen3", tmp_path / "dense")
    with pytest.raises(CheckpointError, match="no weights of the experts"):
        connect(model, tmp_path / "dense", "127.0.0.1:9", "token")
