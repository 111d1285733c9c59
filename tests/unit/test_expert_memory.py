"""Experts larger than memory: the same answers, no more memory than was allowed, and settings that cannot be kept."""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from barista.errors import ConfigError
from experts.checkpoint import Checkpoint, open_checkpoint
from experts.formats import Holding, holding
from experts.pages import spans_of
from experts.residency import Residency
from router.expert_memory import check_expert_memory, require_room_for_experts
from router.format_choice import choose_format, memory_needed
from router.inspect import inspect_checkpoint
from router.model.families import model_spec
from router.model.load import load_model
from router.model.packed import expert_layers, packed_experts
from router.model.tensors import expert_tensors, trunk_tensors
from tests import packable
from tests.forced import FORCED, PROMPTS, logits_of
from tests.unit.tiny_model import CONFIG

ROOT = Path(__file__).parents[2]
FORMATS = ("plain", "int4", "fp8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    with pytest.MonkeyPatch.context() as patch:
        packable.own_cache(tmp_path_factory.mktemp("own") / "cache", patch)
        yield open_checkpoint(packable.make("qwen3_moe", tmp_path_factory.mktemp("model")))


def smallest(checkpoint: Checkpoint, weight_format: str) -> int:
    """Bytes of one token's experts in a layer."""
    with pytest.raises(ConfigError) as refused:
        check_expert_memory(checkpoint, model_spec(checkpoint.config), Holding("float32", weight_format), 1)
    return int(refused.value.remedy.split()[3])


def cached_pages(file: Path) -> set[int]:
    """The pages of a file that the system holds in memory."""
    libc = ctypes.CDLL(None)
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        pages = (ctypes.c_ubyte * (-(-len(mapped) // mmap.PAGESIZE)))()
        view = (ctypes.c_char * len(mapped)).from_buffer(mapped)
        assert libc.mincore(ctypes.byref(view), ctypes.c_size_t(len(mapped)), pages) == 0
        del view
        return {index for index, page in enumerate(pages) if page & 1}


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> dict[str, list[torch.Tensor]]:
    """By format, the answers of the model in memory."""
    answers = {
        f: logits_of(load_model(checkpoint, torch.float32, weight_format=f), PROMPTS, FORCED, 9) for f in FORMATS
    }
    gc.collect()  # pages that a model has mapped would stay in memory
    return answers


@pytest.mark.parametrize("share", [1, 4])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_answers_are_the_same_to_the_byte_and_pages_of_other_experts_are_gone(
    checkpoint: Checkpoint, expected: dict[str, list[torch.Tensor]], weight_format: str, share: int
) -> None:
    limit = share * smallest(checkpoint, weight_format)
    model = load_model(checkpoint, torch.float32, weight_format=weight_format, expert_memory=limit)
    files = expert_files(checkpoint, weight_format)
    for file in files:  # as if they had never been read
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert not cached_pages(file)
    got = logits_of(model, PROMPTS, FORCED, 9)
    assert all(torch.equal(a, b) for a, b in zip(got, expected[weight_format], strict=True))
    residency = model.residency
    assert residency is not None
    assert (residency.hits > 0) == (share > 1)
    assert residency.hits < residency.queries
    assert residency.resident_bytes <= limit or len({layer for layer, _ in residency.held}) == 1
    for file in files:
        assert cached_pages(file) == pages_of(checkpoint, weight_format, residency, file)


def expert_files(checkpoint: Checkpoint, weight_format: str) -> set[Path]:
    """Those that hold nothing but experts: none where these lie in the checkpoint."""
    part = packed_experts(checkpoint, model_spec(checkpoint.config), weight_format)
    return {info.file for info in part.tensors.values()}


def pages_of(checkpoint: Checkpoint, weight_format: str, residency: Residency, file: Path) -> set[int]:
    """Those of the experts that are held."""
    spec = model_spec(checkpoint.config)
    part = packed_experts(checkpoint, spec, weight_format)
    names = {
        name + suffix
        for layer, expert in residency.held
        for name in expert_layers(spec)[layer].tensors(layer, expert)
        for suffix in ("", "_scale_inv")
    }
    spans = spans_of(info for name, info in part.tensors.items() if name in names and info.file == file)
    return {page for span in spans for page in range(span.start // mmap.PAGESIZE, span.end // mmap.PAGESIZE)}


RSS_OF = """
import sys, torch
from pathlib import Path
from benchmarks.engine import Ids, Runner
from experts.checkpoint import open_checkpoint
from router.model.load import load_model

def mapped(folder):
    '''Bytes of the folder's files in this process's memory.'''
    total, counts = 0, False
    for line in open("/proc/self/smaps"):
        if line.split()[0].endswith(":"):
            total += counts * int(line.split()[1]) * 1024 if line.startswith("Rss:") else 0
        else:
            counts = folder in line
    return total

folder, limit = sys.argv[1], int(sys.argv[2])
model = load_model(open_checkpoint(Path(folder)), torch.bfloat16, max_len=64, expert_memory=limit)
ids, runner = Ids(260), Runner(model, 1, 64)
peak, step = 0, model.pool.begin
def begin(*arguments):
    global peak
    rows = step(*arguments).wait()
    peak = max(peak, mapped(folder))
    return type("Done", (), {"wait": lambda self: rows})()
model.pool.begin = begin
for _ in range(20):
    runner.step(ids.draw(1))
print(peak, model.residency.hits, model.residency.queries - model.residency.hits)
"""


def test_a_process_keeps_no_more_of_the_experts_in_memory_than_it_may(tmp_path: Path) -> None:
    expert = 3 * 1024 * 512 * 2
    folder = write_big_model(tmp_path / "model", experts=16)
    total, limit = 4 * 16 * expert, 12 * expert
    assert total > 200e6
    trunk_and_edges = 12_000_000  # what the trunk has mapped, and pages that the system maps around those in use
    command = [sys.executable, "-W", "error", "-c", RSS_OF, str(folder), str(limit)]
    peak, hits, misses = (int(n) for n in subprocess.check_output(command, cwd=ROOT, timeout=60).split())
    assert peak < limit + trunk_and_edges
    assert hits > 0
    assert misses * expert > 2 * limit


def write_big_model(folder: Path, experts: int) -> Path:
    """A bfloat16 checkpoint with experts of 3 MB, all alike."""
    folder.mkdir()
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": experts, "num_hidden_layers": 4}
    config = CONFIG | sizes | {"head_dim": 32, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    spec = model_spec(config)
    shapes = trunk_tensors(spec) | expert_tensors(spec)
    values = torch.randn(1 << 21).mul_(0.03).to(torch.bfloat16)
    tensors = {name: values[: torch.Size(shape).numel()].reshape(shape).clone() for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):  # else all experts score the same
            tensor.copy_(torch.randn(tensor.shape))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_limit_below_one_tokens_experts_is_refused_with_the_smallest_that_works(checkpoint: Checkpoint) -> None:
    spec, held = model_spec(checkpoint.config), Holding("float32", "int4")
    limit = smallest(checkpoint, "int4")
    check_expert_memory(checkpoint, spec, held, limit)
    with pytest.raises(ConfigError, match=rf"expert_memory is {limit - 1} bytes.*at least {limit}"):
        check_expert_memory(checkpoint, spec, held, limit - 1)
    with pytest.raises(ConfigError, match="at least"):
        inspect_checkpoint(checkpoint, 10**9, "int4", 1)


def test_experts_that_are_converted_as_they_are_read_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"experts\.0\.gate_proj\.weight, stored as F32.*held as bf16.*--format int8"):
        check_expert_memory(checkpoint, model_spec(checkpoint.config), holding(checkpoint, "bf16"), 10**9)


def test_a_dense_model_has_no_experts_to_limit(tmp_path: Path) -> None:
    dense = open_checkpoint(packable.make("llama", tmp_path))
    with pytest.raises(ConfigError, match="dense model"):
        check_expert_memory(dense, model_spec(dense.config), holding(dense), 10**9)


def test_only_the_experts_that_may_be_in_memory_count_when_a_model_is_fitted(checkpoint: Checkpoint) -> None:
    spec, held = model_spec(checkpoint.config), holding(checkpoint)
    limit = smallest(checkpoint, "plain")
    whole = memory_needed(checkpoint, spec, held)
    less = memory_needed(checkpoint, spec, held, limit)
    assert less < whole == memory_needed(checkpoint, spec, held, 10**12)
    assert choose_format(checkpoint, spec, "auto", less).format != "auto"
    assert choose_format(checkpoint, spec, "auto", less, limit).format == "auto"
    assert inspect_checkpoint(checkpoint, less, "float32", limit).fits
    assert not inspect_checkpoint(checkpoint, less, "float32").fits
    require_room_for_experts(checkpoint, spec, held, limit, less)
    with pytest.raises(ConfigError, match=r"Give it more memory or fewer bits"):
        require_room_for_experts(checkpoint, spec, held, limit, less - 1)
    with pytest.raises(ConfigError, match=rf"Give at most {limit + 10} \(--expert-memory\)"):
        require_room_for_experts(checkpoint, spec, held, limit + 20, less + 10)
