from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from barista.errors import CheckpointError
from experts.checkpoint import open_checkpoint
from experts.checkpoint.names import check_names
from experts.weights import WeightReader, dequantise_fp8


def write_model(path, tensors):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    save_file(tensors, path / "model.safetensors")
    return open_checkpoint(path)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_returns_the_stored_values_rounded_once(tmp_path, dtype):
    values = torch.randn(5, 7)
    reader = WeightReader(write_model(tmp_path / "m", {"w": values, "half": values.bfloat16()}))
    assert torch.equal(reader.get("w", (5, 7), dtype), values.to(dtype))
    assert torch.equal(reader.get("half", (5, 7), dtype), values.bfloat16().to(dtype))


def test_opening_a_large_tensor_reads_none_of_it(tmp_path):
    size = 64 << 20
    checkpoint = write_model(tmp_path / "m", {"w": torch.zeros(size, dtype=torch.uint8)})
    reader = WeightReader(checkpoint)
    before = resident_bytes()
    tensor = reader.get("w", (size,), torch.uint8)
    assert resident_bytes() - before < size // 8
    assert tensor.numel() == size


def test_a_write_into_a_tensor_never_reaches_the_file(tmp_path):
    checkpoint = write_model(tmp_path / "m", {"w": torch.ones(4)})
    before = checkpoint.files[0].read_bytes()
    WeightReader(checkpoint).get("w", (4,), torch.float32).fill_(7)
    assert checkpoint.files[0].read_bytes() == before
    assert torch.equal(WeightReader(checkpoint).get("w", (4,), torch.float32), torch.ones(4))


def test_a_tensor_outlives_its_reader(tmp_path):
    tensor = WeightReader(write_model(tmp_path / "m", {"w": torch.ones(4)})).get("w", (4,), torch.float32)
    assert torch.equal(tensor, torch.ones(4))


def test_a_tensor_at_an_odd_offset_is_right_and_aligned(tmp_path):
    path = tmp_path / "m"
    header = json.dumps(
        {
            "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "w": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        }
    ).encode()
    write_model(path, {"w": torch.ones(1)})
    data = b"\5" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    tensor = WeightReader(open_checkpoint(path)).get("w", (2,), torch.float32)
    assert tensor.tolist() == [1.5, -2.0]
    assert tensor.data_ptr() % tensor.itemsize == 0  # kernels may assume it


def test_empty_and_scalar_tensors_are_read(tmp_path):
    reader = WeightReader(write_model(tmp_path / "m", {"none": torch.zeros(0, 3), "one": torch.tensor(2.5)}))
    assert reader.get("none", (0, 3), torch.float32).shape == (0, 3)
    assert reader.get("one", (), torch.float32).item() == 2.5


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    reader = WeightReader(write_model(tmp_path / "m", {"w": torch.ones(2, 3)}))
    with pytest.raises(CheckpointError, match="tensor v is missing"):
        reader.get("v", (2, 3), torch.float32)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor w has shape \[2, 3\], expected \[3, 2\]"):
        reader.get("w", (3, 2), torch.float32)


def slow_dequantise(weight, scales):
    rows, columns = torch.arange(weight.shape[0]) // 128, torch.arange(weight.shape[1]) // 128
    return weight.float() * scales[rows][:, columns]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**31))
def test_fp8_blocks_are_multiplied_elementwise_whatever_the_edges(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator)
    expected = slow_dequantise(weight, scales)
    assert torch.equal(dequantise_fp8(weight, scales, torch.float32), expected)
    assert torch.equal(dequantise_fp8(weight, scales, torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8])
def test_fp8_is_dequantised_with_scales_of_any_stored_dtype(tmp_path, scale_dtype):
    weight = torch.randn(576, 256).to(torch.float8_e4m3fn)  # 576 = 512 + 64, DeepSeek's kv_a_proj: not whole blocks
    exponents = torch.randint(-6, 3, (5, 2))
    scales = torch.exp2(exponents.float())
    stored = (exponents + 127).to(torch.uint8) if scale_dtype == torch.uint8 else scales.to(scale_dtype)
    reader = WeightReader(write_model(tmp_path / "m", {"w.weight": weight, "w.weight_scale_inv": stored}))
    assert torch.equal(reader.get("w.weight", (576, 256), torch.float32), slow_dequantise(weight, scales))


def test_fp8_wanted_as_fp8_stays_as_stored(tmp_path):
    weight = torch.randn(4, 4).to(torch.float8_e4m3fn)
    reader = WeightReader(write_model(tmp_path / "m", {"w.weight": weight}))
    stored = reader.get("w.weight", (4, 4), torch.float8_e4m3fn)
    assert torch.equal(stored.view(torch.uint8), weight.view(torch.uint8))


@pytest.mark.parametrize("scales", [{}, {"w.weight_scale_inv": torch.ones(1, 1)}])
def test_fp8_without_fitting_scales_is_refused(tmp_path, scales):
    reader = WeightReader(
        write_model(tmp_path / "m", {"w.weight": torch.zeros(130, 4).to(torch.float8_e4m3fn)} | scales)
    )
    with pytest.raises(CheckpointError, match=r"FP8 tensor w\.weight.*expected \[2, 1\]"):
        reader.get("w.weight", (130, 4), torch.float32)


def test_check_names_accepts_a_fitting_checkpoint_with_scales_and_ignored_names(tmp_path):
    tensors = {"a.weight": torch.ones(2), "a.weight_scale_inv": torch.ones(1), "model.layers.9.x": torch.ones(1)}
    checkpoint = write_model(tmp_path / "m", tensors)
    check_names({"a.weight": (2,)}, checkpoint, lambda name: name.startswith("model.layers.9."))


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"a": (2,), "b": (3,), "c": (1,)}, r"1 missing \(c\)"),
        ({"a": (2,)}, r"1 unexpected \(b\)"),
        ({"a": (2,), "b": (4,)}, r"1 misshapen \(b \[3\] instead of \[4\]\)"),
        ({"a": (2,), "b": (3,)} | {f"x{i}": (1,) for i in range(5)}, r"5 missing \(x0, x1, x2, \.\.\.\)"),
    ],
)
def test_check_names_names_what_does_not_fit(tmp_path, expected, message):
    checkpoint = write_model(tmp_path / "m", {"a": torch.ones(2), "b": torch.ones(3)})
    with pytest.raises(CheckpointError, match=message):
        check_names(expected, checkpoint, lambda name: False)
