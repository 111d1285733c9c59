"""What a GPU must have, what a model takes of it, and what is left for the KV cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from barista.errors import ConfigError
from experts.checkpoint import open_checkpoint
from experts.formats import Holding
from router.device_memory import LEAST_RESERVE, device_bytes, kv_budget, on_device, require_room_on_device
from router.model.device.cuda import cuda_device
from router.model.families import model_spec
from router.model.tensors import count_parameters, trunk_tensors
from tests import tiny

BYTES = st.integers(0, 2**37)


def test_a_torch_for_cpus_alone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match=r"torch 2\.\S+ is built for CPUs alone.*--device cpu"):
        cuda_device()


def test_a_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"no NVIDIA GPU.*--device cpu"):
        cuda_device()


def test_a_gpu_sums_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    products = torch.backends.cuda.matmul
    before = products.allow_bf16_reduced_precision_reduction
    try:
        assert cuda_device() == torch.device("cuda", 0)
        assert not products.allow_bf16_reduced_precision_reduction
    finally:
        products.allow_bf16_reduced_precision_reduction = before


@given(free=BYTES, total=BYTES, wanted=BYTES)
def test_the_cache_leaves_room_for_steps(free: int, total: int, wanted: int) -> None:
    budget = kv_budget(free, total, wanted)
    assert 0 <= budget <= wanted
    assert budget == 0 or (free - budget >= LEAST_RESERVE and free - budget >= total // 10)


def test_the_cache_takes_what_is_wanted_where_that_is_free() -> None:
    assert kv_budget(60 * 2**30, 80 * 2**30, 2**30) == 2**30


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("weight_format", ["plain", "gguf"])
def test_weights_take_their_dtype(tmp_path: Path, dtype: str, size: int, weight_format: str) -> None:
    tiny.make("qwen3_moe", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    spec = model_spec(checkpoint.config)
    total, _ = count_parameters(spec)
    assert device_bytes(checkpoint, spec, on_device(Holding(dtype, weight_format))) == total * size


def test_fp8_takes_a_byte_and_its_scales_for_experts_alone(tmp_path: Path) -> None:
    tiny.make("qwen3_moe", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    spec = model_spec(checkpoint.config)
    trunk = sum(torch.Size(shape).numel() for shape in trunk_tensors(spec).values())
    experts, matrices = count_parameters(spec)[0] - trunk, 3 * 3 * spec.num_experts
    assert device_bytes(checkpoint, spec, on_device(Holding("float32", "fp8"))) == trunk * 4 + experts + matrices * 4


def test_a_model_too_large_is_refused_with_what_it_needs(tmp_path: Path) -> None:
    tiny.make("qwen3_moe", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    spec, held = model_spec(checkpoint.config), Holding("float32")
    needed = device_bytes(checkpoint, spec, held)
    require_room_on_device(checkpoint, spec, held, needed)
    with pytest.raises(ConfigError, match="of a GPU's memory in float32"):
        require_room_on_device(checkpoint, spec, held, needed - 1)
