"""The kernels on a GPU give the bytes of their CPU twin: window by window, output by output. Ranks share the GPU."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import given, settings

from experts.expert_parallel.machine import cuda_library
from experts.expert_parallel.rank import Ranks
from experts.expert_parallel.shape import ExpertMap, GroupShape
from experts.expert_parallel.structs import ABORTED
from tests.unit.expert_parallel import (
    Group,
    Tokens,
    arrival,
    assert_a_silent_rank_is_given_up,
    expected,
    groups,
    random_tokens,
    same,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is in reach"),
]

GPU = "cuda:0"


def on_gpu(shape: GroupShape, experts: ExpertMap, timeout: float = 10.0) -> Group:
    return Group(shape, experts, cuda_library(), GPU, timeout=timeout)


@given(groups())
@settings(deadline=None, max_examples=100)
def test_every_window_and_every_output_has_the_bytes_of_the_twin(
    case: tuple[GroupShape, ExpertMap, list[Tokens]],
) -> None:
    shape, experts, tokens = case
    with contextlib.closing(on_gpu(shape, experts)) as gpu:
        cpu = Group(shape, experts)
        for _ in range(2):
            answers, wanted = gpu.layer(tokens), cpu.layer(tokens)
            torch.cuda.synchronize()
            for (output, failed), (wanted_output, wanted_failed) in zip(answers, wanted, strict=True):
                assert same(output.cpu(), wanted_output)
                assert torch.equal(failed.cpu(), wanted_failed)
            for ours, theirs in zip(gpu.ranks, cpu.ranks, strict=True):
                assert torch.equal(ours.window.tensor().cpu(), theirs.window.tensor())
                assert torch.equal(ours.expert_ends.cpu(), theirs.expert_ends)


@pytest.mark.parametrize("wire", ["values", "fp8"])
@pytest.mark.parametrize("combine", ["exact", "partial"])
def test_the_shape_of_deepseek_v3_has_the_bytes_of_the_twin(wire: str, combine: str) -> None:
    shape = GroupShape(num_ranks=8, num_experts=256, max_local_experts=32, top_k=8, hidden_size=7168, max_tokens=24,
                       wire=wire, combine=combine, alignment=16)  # type: ignore[arg-type]  # fmt: skip
    experts = ExpertMap.even(256, range(8), 8)
    generator = torch.Generator().manual_seed(5)
    tokens = [random_tokens(generator, 24 - rank, 7168, 256, 8, torch.bfloat16) for rank in range(8)]
    gpu, cpu = on_gpu(shape, experts), Group(shape, experts)
    for (output, failed), (wanted, _) in zip(gpu.layer(tokens), cpu.layer(tokens), strict=True):
        assert same(output.cpu(), wanted)
        assert not failed.any()
    for ours, theirs in zip(gpu.ranks, cpu.ranks, strict=True):
        assert torch.equal(ours.window.tensor().cpu(), theirs.window.tensor())
    gpu.close()


def test_ranks_on_streams_of_their_own_race_and_every_row_is_right() -> None:
    shape = GroupShape(num_ranks=8, num_experts=19, max_local_experts=3, top_k=4, hidden_size=256, max_tokens=32,
                       wire="fp8")  # fmt: skip
    experts = ExpertMap.even(19, range(8), 8)
    group = on_gpu(shape, experts)
    alone = [Ranks(group.library, [rank]) for rank in group.ranks]
    streams = [torch.cuda.Stream() for _ in group.ranks]
    generator = torch.Generator().manual_seed(11)
    for _ in range(50):
        tokens = [
            random_tokens(generator, int(torch.randint(0, 33, (1,), generator=generator)), 256, 19, 4, torch.bfloat16)
            for _ in group.ranks
        ]
        answers = group.feed(tokens)
        torch.cuda.synchronize()
        for ranks, stream in zip(alone, streams, strict=True):
            ranks.send(stream.cuda_stream)
        torch.cuda.synchronize()
        group.compute()
        torch.cuda.synchronize()
        for ranks, stream in zip(alone, streams, strict=True):
            ranks.receive(stream.cuda_stream)
        torch.cuda.synchronize()
        for mine, (output, failed) in zip(tokens, answers, strict=True):
            wanted, lost = expected(mine, experts, "exact", arrival(shape))
            assert same(output.cpu(), wanted)
            assert torch.equal(failed.cpu().bool(), lost)
    group.close()


def test_a_layer_in_a_graph_replays_on_new_tokens() -> None:
    shape = GroupShape(num_ranks=4, num_experts=8, max_local_experts=2, top_k=2, hidden_size=128, max_tokens=8)
    experts = ExpertMap.even(8, range(4), 4)
    group = on_gpu(shape, experts)
    generator = torch.Generator().manual_seed(2)

    def draw() -> list[Tokens]:
        return [random_tokens(generator, 8, 128, 8, 2, torch.bfloat16) for _ in range(4)]

    static = [Tokens(*(tensor.to(GPU) for tensor in vars(tokens).values())) for tokens in draw()]
    answers = group.feed(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        group.together.send(stream)
        for rank in group.ranks:
            rank.results(rank.expert_rows * 2)
        group.together.receive(stream)
    for replay in range(1, 6):
        tokens = draw()
        for into, new in zip(static, tokens, strict=True):
            for name, tensor in vars(new).items():
                getattr(into, name).copy_(tensor)
        graph.replay()
        torch.cuda.synchronize()
        for mine, (output, failed) in zip(tokens, answers, strict=True):
            wanted, _ = expected(mine, experts, "exact", arrival(shape), lambda expert, rows: rows * 2)
            assert same(output.cpu(), wanted)
            assert not failed.any()
        assert group.ranks[0].state().epoch == replay
    group.close()


def test_a_rank_that_never_comes_is_given_up() -> None:
    assert_a_silent_rank_is_given_up(cuda_library(), GPU)


def test_an_abort_ends_a_wait_that_has_begun() -> None:
    shape = GroupShape(num_ranks=2, num_experts=2, max_local_experts=1, top_k=1, hidden_size=8, max_tokens=2)
    group = on_gpu(shape, ExpertMap.of([0, 1], 2), timeout=20.0)
    alone = Ranks(group.library, group.ranks[:1])
    ids = torch.tensor([[0], [1]], dtype=torch.int32)
    tokens = Tokens(torch.randn(2, 8).to(torch.bfloat16), ids, torch.ones(2, 1))
    group.layer([tokens] * 2)  # so that every kernel is loaded: that may have to wait for those that run
    group.feed([tokens] * 2)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    alone.send(stream.cuda_stream)  # waits for rank 1 from now on
    group.library.call("ep_window_abort", group.ranks[0].window.address)
    torch.cuda.synchronize()
    assert group.ranks[0].state().status == ABORTED
    group.close()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH")
    # Our kernels alone, and not the calls of libraries that look what a driver has.
    options = ["--report-api-errors", "no", "--kernel-name", "kernel_substring=ep_launch", "--error-exitcode", "9"]
    command = [sanitizer, "--tool", tool, *options, sys.executable, "-m", "tests.gpu.small_cycles"]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # each tensor is memory of its own
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "All cycles are right" in done.stdout
