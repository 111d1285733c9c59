from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from barista.errors import CheckpointError
from experts.checkpoint import open_checkpoint

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8}


def write_model(path, tensors, name="model.safetensors"):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, path / name)
    return path


def write_raw(path, entries, data=b"", header=None):
    """A safetensors file with any header at all."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    text = json.dumps(entries).encode() if header is None else header
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def f32(shape, begin, end):
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def test_lists_every_tensor_with_dtype_shape_and_place(tmp_path):
    a, b = torch.arange(6.0).reshape(2, 3), torch.arange(4, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(write_model(tmp_path / "m", {"a": a, "b": b}))
    assert checkpoint.config == CONFIG
    info = checkpoint.tensors["a"]
    assert (info.dtype, info.shape, info.nbytes) == ("F32", (2, 3), 24)
    assert info.file.read_bytes()[info.offset : info.offset + info.nbytes] == a.numpy().tobytes()


def test_reads_a_sharded_model_through_its_index(tmp_path):
    path = write_model(tmp_path / "m", {"a": torch.zeros(2)}, "one.safetensors")
    write_model(path, {"b": torch.zeros(3)}, "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(path)
    assert {name: info.file.name for name, info in checkpoint.tensors.items()} == index["weight_map"]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors", "b": "gone.safetensors"}, "gone.safetensors, which is missing"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "tensor b is not in one.safetensors"),
        ({"a": "../one.safetensors"}, "not a plain file name"),
        ({}, "weight_map"),
        (["a"], "weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, weight_map, message):
    path = write_model(tmp_path / "m", {"a": torch.zeros(2)}, "one.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        ({"t": f32([2], 0, 8)}, b"\0" * 4, "tensor t: bytes 0..8 lie outside the 4"),
        ({"t": f32([3], 0, 8)}, b"\0" * 8, "tensor t: F32 .3. does not fill 8"),
        ({"t": f32([2**62, 2**62], 0, 8)}, b"\0" * 8, "does not fill"),
        ({"t": f32([-2], 0, 8)}, b"\0" * 8, "tensor t: .*non-negative"),
        ({"t": f32([2.0], 0, 8)}, b"\0" * 8, "tensor t: .*integers"),
        ({"t": f32([1], 4, 8)}, b"\0" * 8, "tensor t: starts at byte"),
        ({"t": f32([1], 0, 4), "u": f32([1], 0, 4)}, b"\0" * 4, "tensor u: starts at byte"),
        ({"t": f32([1], 0, 4)}, b"\0" * 8, "4 bytes after the last tensor"),
        ({"t": {"dtype": "F77", "shape": [], "data_offsets": [0, 0]}}, b"", "unknown dtype 'F77'"),
        ({"t": {"dtype": ["F32"], "shape": [], "data_offsets": [0, 0]}}, b"", "unknown dtype"),
        ({"t": {"shape": []}}, b"", "tensor t: needs dtype"),
        ({"t": 3}, b"", "tensor t: needs dtype"),
        ([], b"", "not a JSON object"),
    ],
)
def test_a_lying_header_is_refused_by_tensor(tmp_path, entries, data, message):
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(write_raw(tmp_path / "m", entries, data))
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\1\2",
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 10) + b"{}",
        struct.pack("<Q", 2) + b"\xff\xff",
        struct.pack("<Q", 60_000) + b"[" * 60_000,
        struct.pack("<Q", 17) + b'{"a": 1, "a": 2} ',
    ],
)
def test_a_broken_file_is_refused_before_it_is_mapped(tmp_path, content):
    path = write_raw(tmp_path / "m", {})
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not a valid safetensors file.*barista pull"):
        open_checkpoint(path)


def test_a_directory_without_weights_or_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no model"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="JSON object"):
        open_checkpoint(tmp_path)


def test_fused_experts_appear_one_by_one_with_gate_rows_first(tmp_path):
    experts, hidden, inner = 3, 4, 2
    gate_up, down = torch.randn(experts, 2 * inner, hidden), torch.randn(experts, hidden, inner)
    prefix = "model.layers.0.mlp.experts"
    path = write_model(tmp_path / "m", {f"{prefix}.gate_up_proj": gate_up, f"{prefix}.down_proj": down})
    tensors = open_checkpoint(path).tensors
    assert len(tensors) == 3 * experts

    def stored(name):
        info = tensors[f"{prefix}.{name}.weight"]
        raw = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
        return torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(info.shape)

    for e in range(experts):
        assert torch.equal(stored(f"{e}.gate_proj"), gate_up[e, :inner])
        assert torch.equal(stored(f"{e}.up_proj"), gate_up[e, inner:])
        assert torch.equal(stored(f"{e}.down_proj"), down[e])


def test_model_safetensors_wins_over_other_files_and_two_others_are_refused(tmp_path):
    path = write_model(tmp_path / "m", {"a": torch.zeros(2)})
    write_model(path, {"vendor": torch.zeros(2)}, "consolidated.safetensors")
    assert list(open_checkpoint(path).tensors) == ["a"]
    (path / "model.safetensors").rename(path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"2 \.safetensors files and no model\.safetensors\.index\.json"):
        open_checkpoint(path)
