"""`barista inspect` against figures computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from barista.errors import CheckpointError
from experts.checkpoint import TensorInfo, open_checkpoint
from experts.formats import held_dtype_of
from experts.weights import WeightReader
from router.inspect import inspect_checkpoint
from router.model.families import model_spec
from router.model.load import load_model
from router.model.tensors import expert_tensors, trunk_tensors

MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 24,
    "moe_intermediate_size": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "mlp_only_layers": [0],
}
LATENT: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 50, "hidden_size": 8, "intermediate_size": 16,
    "moe_intermediate_size": 4, "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2,
    "q_lora_rank": None, "kv_lora_rank": 12, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "max_position_embeddings": 32,
}  # fmt: skip
# By hand, of MOE. Attention: q and o 8x8, k and v 4x8, two norms of 4; two layer norms of 8.
LAYER = 64 + 64 + 32 + 32 + 4 + 4 + 8 + 8
GATE, EXPERT, DENSE_FFN, TABLE = 6 * 8, 3 * 8 * 4, 3 * 8 * 24, 100 * 8
TRUNK = 3 * LAYER + 2 * GATE + DENSE_FFN + 2 * TABLE + 8


def write(folder: Path, config: dict[str, Any], *, drop: str = "") -> Path:
    spec = model_spec(config)
    shapes = trunk_tensors(spec) | expert_tensors(spec)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name != drop}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_moe_model(tmp_path: Path) -> None:
    figures = inspect_checkpoint(open_checkpoint(write(tmp_path, MOE)), 10**9)
    assert (figures.num_layers, figures.num_moe_layers, figures.num_experts, figures.top_k) == (3, 2, 6, 2)
    assert figures.parameters == TRUNK + 2 * 6 * EXPERT
    assert figures.active_parameters == TRUNK - TABLE + 2 * 2 * EXPERT
    assert figures.file_bytes == 4 * figures.parameters
    one_row = 8
    assert figures.active_bytes_per_token == 4 * (TRUNK - TABLE + one_row + 2 * 2 * EXPERT)
    assert figures.kv_bytes_per_token == 3 * 2 * 4 * 4  # layers, k and v, head_dim, float32
    assert figures.memory_bytes == figures.file_bytes + 64 * figures.kv_bytes_per_token


def test_tied_embeddings_are_read_for_every_token(tmp_path: Path) -> None:
    figures = inspect_checkpoint(open_checkpoint(write(tmp_path, MOE | {"tie_word_embeddings": True})), 10**9)
    assert figures.parameters == TRUNK - TABLE + 2 * 6 * EXPERT
    assert figures.active_parameters == TRUNK - TABLE + 2 * 2 * EXPERT
    assert figures.active_bytes_per_token == 4 * figures.active_parameters


def test_a_dense_model_uses_all_of_itself(tmp_path: Path) -> None:
    config = MOE | {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
    figures = inspect_checkpoint(open_checkpoint(write(tmp_path, config)), 10**9)
    assert figures.num_experts == figures.top_k == figures.num_moe_layers == 0
    assert figures.parameters == figures.active_parameters == 3 * (LAYER + DENSE_FFN) + TABLE + 8
    assert figures.active_bytes_per_token == figures.held_bytes == figures.file_bytes


def write_stored_as(dtype: torch.dtype, folder: Path) -> Path:
    """MOE with its experts in this dtype beside a bfloat16 trunk (FP8, with scales), or else a float32 one."""
    spec = model_spec(MOE)
    beside = torch.bfloat16 if dtype == torch.float8_e4m3fn else torch.float32
    tensors = {name: torch.zeros(shape, dtype=beside) for name, shape in trunk_tensors(spec).items()}
    for name, shape in expert_tensors(spec).items():
        tensors[name] = torch.zeros(shape).to(dtype)
        if dtype == torch.float8_e4m3fn:
            tensors[name + "_scale_inv"] = torch.ones(1, 1)
    save_torch_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(MOE))
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float32])
def test_memory_is_what_the_engine_holds_and_not_what_is_stored(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(write_stored_as(dtype, tmp_path))
    figures = inspect_checkpoint(checkpoint, 10**9)
    held: list[int] = []
    get = WeightReader.get

    def recording(self: WeightReader, name: str, shape: tuple[int, ...], wanted: torch.dtype) -> torch.Tensor:
        tensor = get(self, name, shape, wanted)
        held.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(WeightReader, "get", recording)
    load_model(checkpoint, getattr(torch, figures.held_dtype))
    assert figures.held_bytes == sum(held)
    assert figures.memory_bytes == sum(held) + 64 * figures.kv_bytes_per_token
    one_row, of_trunk, of_experts = 8, *((2, 2) if dtype == torch.float8_e4m3fn else (4, dtype.itemsize))
    assert figures.active_bytes_per_token == of_trunk * (TRUNK - TABLE + one_row) + of_experts * 2 * 2 * EXPERT


@pytest.mark.parametrize(
    ("stored", "shape", "model_dtype", "held"),
    [
        ("F16", (4, 4), "float32", "float16"),
        ("F16", (4,), "float32", "float32"),
        ("F16", (4, 4), "bfloat16", "bfloat16"),
        ("Q4_1", (4, 32), "float32", "float32"),
        ("F8_E4M3", (4, 4), "bfloat16", "bfloat16"),
    ],
)
def test_only_float16_matrices_of_a_float32_model_are_held_as_stored(
    stored: str, shape: tuple[int, ...], model_dtype: str, held: str
) -> None:
    info = TensorInfo(name="a", dtype=stored, shape=shape, file=Path("m"), offset=0, nbytes=0)
    assert held_dtype_of(info, model_dtype) == held


@pytest.mark.parametrize(("wanted", "bits"), [("float32", 32), ("bf16", 16)])
def test_the_format_that_is_asked_for_is_the_one_that_is_reported(tmp_path: Path, wanted: str, bits: int) -> None:
    figures = inspect_checkpoint(open_checkpoint(write(tmp_path, MOE)), 10**9, wanted)
    assert (figures.format, figures.reason) == (wanted, "")
    assert figures.held_bytes == figures.parameters * bits // 8


def test_a_format_that_its_shapes_cannot_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\[100, 8\] cannot be held as int4"):
        inspect_checkpoint(open_checkpoint(write(tmp_path, MOE)), 10**9, "int4")


def test_a_model_fits_exactly_when_its_memory_is_available(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, MOE))
    needed = inspect_checkpoint(checkpoint, 0).memory_bytes
    assert inspect_checkpoint(checkpoint, needed).fits
    assert not inspect_checkpoint(checkpoint, needed - 1).fits


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.experts.5.up_proj.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        inspect_checkpoint(open_checkpoint(write(tmp_path, MOE, drop=name)), 10**9)


def test_an_unknown_architecture_is_named_with_the_known_ones(tmp_path: Path) -> None:
    write(tmp_path, MOE)
    (tmp_path / "config.json").write_text(json.dumps(MOE | {"architectures": ["FooForCausalLM"]}))
    with pytest.raises(CheckpointError, match=r"FooForCausalLM.*Qwen3MoeForCausalLM"):
        inspect_checkpoint(open_checkpoint(tmp_path), 10**9)


def test_a_small_latent_attention_caches_the_latent_and_the_rotary_key(tmp_path: Path) -> None:
    figures = inspect_checkpoint(open_checkpoint(write(tmp_path, LATENT)), 10**9)
    assert figures.kv_bytes_per_token == 2 * (12 + 2) * 4
    assert figures.shared_intermediate_size == 4


def test_a_gate_with_float32_logits_is_held_in_float32(tmp_path: Path) -> None:
    spec = model_spec(LATENT)
    shapes = trunk_tensors(spec) | expert_tensors(spec)
    save_torch_file(
        {n: torch.zeros(s, dtype=torch.bfloat16) for n, s in shapes.items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(LATENT))
    figures = inspect_checkpoint(open_checkpoint(tmp_path), 10**9)
    gate_and_bias = 4 * 8 + 4
    assert figures.held_bytes == 2 * figures.parameters + 2 * gate_and_bias
