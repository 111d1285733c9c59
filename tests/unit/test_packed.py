"""The packed cache: whole or not at all, whoever else converts and whatever fails; and it holds what was encoded."""

from __future__ import annotations

import json
import logging
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from barista.errors import CacheError, CheckpointError
from experts import kernels
from experts.checkpoint import Checkpoint, open_checkpoint
from experts.formats import QUANTISED, codec, holding
from experts.packed import convert
from experts.packed.layout import PAGE, Part
from experts.weights import WeightReader, dequantise_fp8
from router.model.families import model_spec
from router.model.packed import packed_experts, packed_trunk
from tests import packable
from tests.unit.test_gguf import EXPERTS, HEADS, HIDDEN, permute, rand, write_gguf

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return packable.own_cache(tmp_path / "cache", monkeypatch)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packable.make("qwen3_moe", tmp_path_factory.mktemp("model"))


def experts(path: Path, weight_format: str = "int4") -> Part:
    checkpoint = open_checkpoint(path)
    return packed_experts(checkpoint, model_spec(checkpoint.config), weight_format)


def contents(part: Part) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(part.folder.iterdir())}


@pytest.mark.parametrize("weight_format", list(QUANTISED))
def test_every_tensor_is_read_as_what_it_was_encoded_to(path: Path, weight_format: str) -> None:
    checkpoint = open_checkpoint(path)
    spec = model_spec(checkpoint.config)
    plain = WeightReader(checkpoint)
    for part in (packed_experts(checkpoint, spec, weight_format), packed_trunk(checkpoint, spec, weight_format)):
        convert.prepare(part)
        reader = WeightReader(part.over(checkpoint))
        for name, form in part.forms.items():
            shape = checkpoint.tensors[name].shape
            weight = plain.get(name, shape, torch.float32)
            held = reader.weight(name, shape, torch.float32)  # type: ignore[arg-type]  # they all have two dimensions
            if weight_format == "fp8":
                expected = dequantise_fp8(*kernels.encode_fp8(weight), torch.float32)
            else:
                expected = torch.from_numpy(codec.decode(form, codec.encode(form, weight.numpy()), shape))  # type: ignore[arg-type]
            assert not isinstance(held, torch.Tensor)
            assert torch.equal(held.float(), expected)


def test_the_gates_and_what_is_not_a_matrix_stay_as_they_are(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    packed = packed_trunk(checkpoint, model_spec(checkpoint.config), "int8").forms
    plain = {name.split(".")[-2] for name in checkpoint.tensors if name not in packed and ".experts." not in name}
    assert plain == {"gate", "input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm"}


def test_a_second_start_converts_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert.prepare(experts(path))
    monkeypatch.setattr(convert, "new_directory", None)
    convert.prepare(experts(path))


def test_a_checkpoint_that_was_written_to_since_is_another_one(path: Path, tmp_path: Path) -> None:
    copy = packable.make("qwen3_moe", tmp_path / "copy")
    before = experts(copy).folder
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors, copy / "model.safetensors")
    assert experts(copy).folder != before


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-PAGE - 1] ^= 1
    file.write_bytes(data)


def edit(key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        value = json.loads((folder / "index.json").read_text())
        value["identity"][key] = 0
        (folder / "index.json").write_text(json.dumps(value))

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: flip(folder / "layer-00001.bin"), "layer-00001.bin is damaged"),
        (lambda folder: (folder / "layer-00002.bin").write_bytes(b""), "has 0 bytes"),
        (lambda folder: (folder / "layer-00002.bin").unlink(), "has 0 bytes"),
        (lambda folder: (folder / "index.json").write_text("[1"), "missing or damaged"),
        (edit("version"), "another version"),
        (edit("model"), "another model"),
        (edit("layout"), "another layout"),
    ],
)
def test_a_damaged_or_foreign_folder_is_made_again_and_that_is_said_once(
    path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], said: str
) -> None:
    part = experts(path)
    convert.prepare(part)
    whole = contents(part)
    damage(part.folder)
    with caplog.at_level(logging.WARNING):
        convert.prepare(part)
    assert [record.message for record in caplog.records if said in record.message and "made again" in record.message]
    assert len(caplog.records) == 1
    assert contents(part) == whole


def child(path: Path, code: str) -> subprocess.Popen[str]:
    """A process that converts the model's experts, after this code."""
    program = f"""
import os, sys, time
from pathlib import Path
from experts.packed import convert
from experts.checkpoint import open_checkpoint
from router.model.families import model_spec
from router.model.packed import packed_experts
write = convert._write_file
checkpoint = open_checkpoint(Path({str(path)!r}))
{code}
convert._write_file = write_file
convert.prepare(packed_experts(checkpoint, model_spec(checkpoint.config), "int4"))
"""
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_conversion_that_is_killed_goes_on_with_the_files_that_it_had_finished(
    path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = """
def write_file(path, part, reader):
    if path.name == "layer-00001.bin":
        path.with_name("." + path.name).write_bytes(b"half")
        print("in the middle", flush=True)
        time.sleep(600)
    write(path, part, reader)
"""
    with child(path, stuck) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the middle\n"
        process.send_signal(signal.SIGKILL)
    part = experts(path)
    assert not part.folder.exists()
    written: list[str] = []
    write = convert._write_file

    def recording(file: Path, part: Part, reader: WeightReader) -> None:
        written.append(file.name)
        write(file, part, reader)

    monkeypatch.setattr(convert, "_write_file", recording)
    convert.prepare(part)
    assert written == ["layer-00001.bin", "layer-00002.bin"]
    resumed = contents(part)
    monkeypatch.setenv("BARISTA_CACHE", str(cache / "afresh"))
    convert.prepare(fresh := experts(path))
    assert contents(fresh) == resumed


def test_of_two_processes_that_convert_at_once_one_does_and_both_are_served(path: Path) -> None:
    slow = """
def write_file(path, part, reader):
    print(path.name, flush=True)
    time.sleep(0.5)
    write(path, part, reader)
"""
    processes = [child(path, slow) for _ in range(2)]
    said = sorted("".join(process.communicate(timeout=120)[0].split()) for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert said == ["", "layer-00000.binlayer-00001.binlayer-00002.bin"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As a disk that is full once a file has grown so large."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_an_error_with_a_remedy_and_leaves_nothing_half_made(path: Path) -> None:
    part = experts(path, "int8")
    with largest_file(2 * PAGE), pytest.raises(CacheError, match="BARISTA_CACHE"):
        convert.prepare(part)
    assert not part.folder.exists()
    assert not list(part.folder.parent.rglob("*.bin"))
    convert.prepare(part)
    assert contents(part).keys() == {"index.json", *part.sizes}


def test_too_little_room_is_found_out_before_anything_is_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: __import__("shutil")._ntuple_diskusage(10**9, 0, 5000))
    part = experts(path)
    with pytest.raises(CacheError, match=r"needs .* and its disk has 5\.0 kB free"):
        convert.prepare(part)
    assert not list(part.folder.parent.rglob("*.bin"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_its_tensors_name(path: Path, tmp_path: Path, bad: float) -> None:
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    if name not in tensors:  # transformers may store the experts of a layer as one tensor
        name = next(name for name in tensors if ".layers.1." in name and "experts" in name)
    tensors[name].view(-1)[5] = bad
    (tmp_path / "bad").mkdir()
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    (tmp_path / "bad" / "config.json").write_text((path / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\..*not finite"):
        convert.prepare(experts(tmp_path / "bad"))


# ---------------------------------------------------------------- GGUF: its own blocks, rearranged without loss


def gguf_model(folder: Path, kind: gguf.GGMLQuantizationType) -> tuple[Checkpoint, dict[str, np.ndarray]]:
    """A one-layer Mixtral as llama.cpp writes it, q and k rows reordered; and its dequantised tensors, in order."""
    inner = 128
    tensors = {
        "token_embd.weight": rand(10, HIDDEN),
        "output_norm.weight": rand(HIDDEN),
        "output.weight": rand(12, HIDDEN),
        "blk.0.attn_norm.weight": rand(HIDDEN),
        "blk.0.ffn_norm.weight": rand(HIDDEN),
        "blk.0.attn_q.weight": rand(HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": rand(HIDDEN // 2, HIDDEN),
        "blk.0.attn_v.weight": rand(HIDDEN // 2, HIDDEN),
        "blk.0.attn_output.weight": rand(HIDDEN, HIDDEN) * 3,
        "blk.0.ffn_gate_inp.weight": rand(EXPERTS, HIDDEN),
        "blk.0.ffn_gate_exps.weight": rand(EXPERTS, inner, HIDDEN),
        "blk.0.ffn_up_exps.weight": rand(EXPERTS, inner, HIDDEN) + 1,
        "blk.0.ffn_down_exps.weight": rand(EXPERTS, HIDDEN, inner),
    }
    stored = tensors | {
        "blk.0.attn_q.weight": permute(tensors["blk.0.attn_q.weight"], HEADS),
        "blk.0.attn_k.weight": permute(tensors["blk.0.attn_k.weight"], 2),
    }
    matrices = [name for name, values in tensors.items() if values.ndim > 1 and "gate_inp" not in name]
    file = write_gguf(
        folder / "m.gguf", "llama", stored, metadata={"expert_count": EXPERTS, "expert_used_count": 2},
        quantise=dict.fromkeys(matrices, kind), inner=inner,
    )  # fmt: skip
    dequantised = {name: gguf.dequantize(gguf.quantize(tensors[name], kind), kind) for name in matrices}
    return open_checkpoint(file), dequantised


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0])
def test_blocks_of_gguf_are_kept_to_the_bit_and_their_rows_put_in_order(
    tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    checkpoint, dequantised = gguf_model(tmp_path, kind)
    assert holding(checkpoint).format == "gguf"
    spec = model_spec(checkpoint.config)
    packed = checkpoint
    for part in (packed_experts(checkpoint, spec, "gguf"), packed_trunk(checkpoint, spec, "gguf")):
        convert.prepare(part)
        packed = part.over(packed)
    reader = WeightReader(packed)

    def values(name: str) -> np.ndarray:
        weight = reader.weight(name, checkpoint.tensors[name].shape, torch.float32)  # type: ignore[arg-type]
        assert isinstance(weight, kernels.TiledWeight)
        array: np.ndarray = weight.float().numpy()
        return array

    layer = "model.layers.0."
    for theirs, ours in (
        ("token_embd", "model.embed_tokens"), ("output", "lm_head"), ("blk.0.attn_q", f"{layer}self_attn.q_proj"),
        ("blk.0.attn_k", f"{layer}self_attn.k_proj"), ("blk.0.attn_v", f"{layer}self_attn.v_proj"),
        ("blk.0.attn_output", f"{layer}self_attn.o_proj"),
    ):  # fmt: skip
        assert np.array_equal(values(f"{ours}.weight"), dequantised[f"{theirs}.weight"])
    for role, ours in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        for expert in range(EXPERTS):
            name = f"{layer}block_sparse_moe.experts.{expert}.{ours}.weight"
            assert np.array_equal(values(name), dequantised[f"blk.0.ffn_{role}_exps.weight"][expert])


def test_a_block_whose_scale_is_not_finite_is_refused(tmp_path: Path) -> None:
    checkpoint, _ = gguf_model(tmp_path, gguf.GGMLQuantizationType.Q8_0)
    place = checkpoint.tensors["lm_head.weight"]
    with place.file.open("r+b") as stream:
        stream.seek(place.offset)
        stream.write(np.float16(np.inf).tobytes())
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .*not finite"):
        convert.prepare(packed_trunk(checkpoint, model_spec(checkpoint.config), "gguf"))


# ---------------------------------------------------------------- FP8 as DeepSeek publishes it


def test_stored_fp8_is_mapped_and_not_encoded_again(path: Path, tmp_path: Path, cache: Path) -> None:
    stored: dict[str, torch.Tensor] = {}
    for name, info in open_checkpoint(path).tensors.items():
        weight = WeightReader(open_checkpoint(path)).get(name, info.shape, torch.float32)
        stored[name] = weight.bfloat16()
        if ".experts." in name or "_proj" in name:
            stored[name], stored[name + "_scale_inv"] = kernels.encode_fp8(weight)
    (tmp_path / "fp8").mkdir()
    save_file(stored, tmp_path / "fp8" / "model.safetensors")
    (tmp_path / "fp8" / "config.json").write_text((path / "config.json").read_text())
    checkpoint = open_checkpoint(tmp_path / "fp8")
    assert holding(checkpoint).format == "fp8"
    part = packed_experts(checkpoint, model_spec(checkpoint.config), "fp8")
    convert.prepare(part)
    assert not (cache / "packed").exists()
    reader = WeightReader(part.over(checkpoint))
    for name in part.forms:
        held = reader.weight(name, checkpoint.tensors[name].shape, torch.bfloat16)  # type: ignore[arg-type]
        assert isinstance(held, kernels.Fp8Weight)
        assert torch.equal(held.values.view(torch.uint8), stored[name].view(torch.uint8))
        assert torch.equal(held.float(), dequantise_fp8(held.values, held.scales, torch.float32))


def test_a_part_shows_its_tensors_in_place_of_the_checkpoints_own(path: Path) -> None:
    part = experts(path)
    view = part.over(part.source)
    assert view.tensors.keys() == part.source.tensors.keys()
    assert replace(view, tensors=part.source.tensors) == part.source
