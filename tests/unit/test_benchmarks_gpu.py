"""The bytes that must move, against figures worked out by hand for DeepSeek-V3 on eight ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch

from benchmarks import gpu, gpu_model
from benchmarks.gpu import Line
from benchmarks.gpu_bytes import Cycle, expected_copies, expert_layer_bytes
from benchmarks.random_model import write_model

COPY = 4.3e12


def cycle(tokens_a_rank: int, *, fp8: bool = True) -> Cycle:
    tokens = 8 * tokens_a_rank
    copies = round(tokens * expected_copies(8, 256, 8))
    return Cycle(tokens=tokens, copies=copies, pairs=8 * tokens, hidden=7168, top_k=8, fp8=fp8)


def test_a_token_goes_to_as_many_ranks_as_it_must() -> None:
    assert expected_copies(8, 256, 8) == pytest.approx(5.295, abs=1e-3)
    assert expected_copies(4, 256, 8) == pytest.approx(3.614, abs=1e-3)
    assert expected_copies(1, 256, 8) == 1


@pytest.mark.parametrize(("tokens", "dispatch", "exact", "partial"), [(128, 12.9, 30.7, 21.5), (2048, 206, 492, 344)])
def test_floors_are_those_of_the_design(tokens: int, dispatch: float, exact: float, partial: float) -> None:
    must = cycle(tokens)
    assert must.dispatch / COPY * 1e6 == pytest.approx(dispatch, rel=0.01)
    assert must.combine_exact / COPY * 1e6 == pytest.approx(exact, rel=0.01)
    assert must.combine_partial / COPY * 1e6 == pytest.approx(partial, rel=0.01)


def test_one_token_wakes_its_experts_alone() -> None:
    assert expert_layer_bytes(8, 8, 7168, 2048, 2) == 8 * 3 * 7168 * 2048 * 2 + 8 * 4 * 7168


def test_a_line_shows_the_share_of_the_limit() -> None:
    assert str(Line("dispatch", 128, 20e-6, 10e-6)) == "| dispatch | 128 | 20.0 | 10.0 | 50% |"


def test_a_decode_step_counts_the_experts_that_it_wakes(tmp_path: Path) -> None:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "moe_intermediate_size": 32,
        "intermediate_size": 64,
        "vocab_size": 1024,
        "max_position_embeddings": 512,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    write_model(tmp_path, config)
    one, *_, many = gpu_model.decode_steps(tmp_path, torch.device("cpu"))
    expert = 3 * 64 * 32 * 2
    trunk = one.nbytes - 2 * 2 * expert  # two experts in each of two layers
    assert trunk > 1024 * 64 * 2  # the head is read whole
    assert many.nbytes == pytest.approx(trunk + 2 * 8 * expert, rel=0.01)
    assert many.seconds > 0


class OneSecond:
    """A clock for which all work takes a second."""

    def once(self, work: Callable[[], object]) -> float:
        work()
        return 1.0

    in_a_graph = once


@pytest.mark.parametrize(("fp8", "form", "weight_bytes"), [(False, "bf16", 2), (True, "fp8", 1 + 4 / 128**2)])
def test_a_layers_lines_name_the_product_that_a_server_takes(
    fp8: bool, form: str, weight_bytes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"GPU": torch.device("cpu"), "HIDDEN": 256, "INTERMEDIATE": 128}.items():
        monkeypatch.setattr(gpu, name, value)
    lines = list(gpu.layer_lines(cast(gpu.Clock, OneSecond()), 1.0, gpu.TOP_K, fp8=fp8))
    assert [line.tokens for line in lines] == [1, 16, 128, 1024]
    assert {line.what for line in lines} == {f"MoE layer, 8 experts, {form}, loop, chosen"}
    assert lines[0].floor == pytest.approx(8 * 3 * 256 * 128 * weight_bytes + 8 * 4 * 256)
