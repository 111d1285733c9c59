"""The kernels themselves, on a GPU in software: the bytes of their CPU twin, and no thread left alone at a barrier."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from experts.expert_parallel.rank import Ranks
from experts.expert_parallel.shape import ExpertMap, GroupShape
from experts.expert_parallel.structs import ABORTED, OVERFLOW, TIMED_OUT, UNREACHABLE
from tests.unit.emulated import emulated_library
from tests.unit.expert_parallel import Group, Tokens, groups, random_tokens, same


def assert_twins(shape: GroupShape, experts: ExpertMap, tokens: list[Tokens]) -> None:
    """Two layers by the kernels and by the twin: all windows, outputs and expert rows."""
    gpu = Group(shape, experts, emulated_library())
    cpu = Group(shape, experts)
    for _ in range(2):
        answers, wanted = [], []
        for group, into in ((gpu, answers), (cpu, wanted)):
            into += group.feed(tokens)
            group.together.send()
            group.compute()
            group.together.receive()
        for ours, theirs in zip(gpu.ranks, cpu.ranks, strict=True):
            assert torch.equal(ours.window.tensor(), theirs.window.tensor())
            assert bytes(ours.state()) == bytes(theirs.state())
            assert torch.equal(ours.expert_ends, theirs.expert_ends)
            assert same(ours.expert_rows, theirs.expert_rows)
        for (output, failed), (wanted_output, wanted_failed) in zip(answers, wanted, strict=True):
            assert same(output, wanted_output)
            assert torch.equal(failed, wanted_failed)


@given(groups())
@settings(deadline=None, max_examples=30)
def test_every_byte_is_that_of_the_twin(case: tuple[GroupShape, ExpertMap, list[Tokens]]) -> None:
    assert_twins(*case)


@pytest.mark.parametrize("num_tokens", [1023, 1024, 1025, 2500])
def test_more_tokens_than_a_block_has_threads_are_counted_in_order(num_tokens: int) -> None:
    shape = GroupShape(num_ranks=2, num_experts=5, max_local_experts=3, top_k=2, hidden_size=8, max_tokens=num_tokens)
    generator = torch.Generator().manual_seed(num_tokens)
    tokens = [random_tokens(generator, count, 8, 5, 2, torch.bfloat16) for count in (num_tokens, 3)]
    assert_twins(shape, ExpertMap.even(5, [0, 1], 2), tokens)


@pytest.mark.parametrize("num_experts", [31, 32, 33, 70])
def test_more_local_experts_than_a_warp_has_lanes_are_added_up(num_experts: int) -> None:
    shape = GroupShape(num_ranks=2, num_experts=num_experts, max_local_experts=num_experts, top_k=4, hidden_size=8,
                       max_tokens=20, alignment=4)  # fmt: skip
    generator = torch.Generator().manual_seed(num_experts)
    tokens = [random_tokens(generator, 20, 8, num_experts, 4, torch.bfloat16) for _ in range(2)]
    assert_twins(shape, ExpertMap.of([1] * num_experts, 2), tokens)


@pytest.mark.parametrize("hidden", [4224, 7168])
@pytest.mark.parametrize("wire", ["values", "fp8"])
@pytest.mark.parametrize("combine", ["exact", "partial"])
def test_rows_longer_than_a_block_is_wide_are_moved_in_turns(hidden: int, wire: str, combine: str) -> None:
    shape = GroupShape(num_ranks=2, num_experts=4, max_local_experts=2, top_k=2, hidden_size=hidden, max_tokens=2,
                       wire=wire, combine=combine)  # type: ignore[arg-type]  # fmt: skip
    generator = torch.Generator().manual_seed(hidden)
    tokens = [random_tokens(generator, 2, hidden, 4, 2, torch.bfloat16) for _ in range(2)]
    assert_twins(shape, ExpertMap.even(4, [0, 1], 2), tokens)


@pytest.mark.parametrize("combine", ["exact", "partial"])
def test_a_block_of_many_warps_moves_one_row_after_another(combine: str) -> None:
    shape = GroupShape(num_ranks=2, num_experts=4, max_local_experts=2, top_k=2, hidden_size=1024, max_tokens=30,
                       combine=combine)  # type: ignore[arg-type]  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    tokens = [random_tokens(generator, 30, 1024, 4, 2, torch.bfloat16) for _ in range(2)]
    assert_twins(shape, ExpertMap.even(4, [0, 1], 2), tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoded_rows_are_decoded_as_by_the_twin(dtype: torch.dtype) -> None:
    shape = GroupShape(num_ranks=2, num_experts=4, max_local_experts=2, top_k=2, hidden_size=384, max_tokens=5,
                       dtype=dtype, wire="fp8")  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tokens = [random_tokens(generator, 5, 384, 4, 2, dtype) for _ in range(2)]
    assert_twins(shape, ExpertMap.even(4, [0, 1], 2), tokens)


def test_what_goes_wrong_goes_wrong_as_in_the_twin() -> None:
    shape = GroupShape(
        num_ranks=3, num_experts=4, max_local_experts=2, top_k=2, hidden_size=8, max_tokens=4, max_rows=4
    )
    experts = ExpertMap.of([0, 0, 1, 2], 3)
    ids = torch.tensor([[0, 1], [0, 3], [2, 1], [0, 2]], dtype=torch.int32)
    tokens = [Tokens(torch.randn(4, 8).to(torch.bfloat16), ids, torch.rand(4, 2)) for _ in range(3)]
    statuses, windows = [], []
    for library in (emulated_library(), None):
        group = Group(shape, experts, library, timeout=0.5)
        group.layer(tokens)
        here = Ranks(group.library, group.ranks[:2])  # the third one never comes again
        for _ in range(2):
            answers = group.feed(tokens)
            here.send()
            group.compute()
            here.receive()
        statuses.append([(rank.state().status, rank.state().alive) for rank in group.ranks[:2]])
        statuses[-1] += [failed.tolist() for _, failed in answers[:2]]
        windows.append([rank.window.tensor() for rank in group.ranks])
    assert statuses[0] == statuses[1]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*windows, strict=True))
    assert statuses[0][0] == (TIMED_OUT | OVERFLOW | UNREACHABLE, 0b011)


def test_an_abort_ends_a_wait() -> None:
    shape = GroupShape(num_ranks=2, num_experts=2, max_local_experts=1, top_k=1, hidden_size=8, max_tokens=2)
    group = Group(shape, ExpertMap.of([0, 1], 2), emulated_library(), timeout=3600.0)
    alone = Ranks(group.library, group.ranks[:1])
    ids = torch.tensor([[0], [1]], dtype=torch.int32)
    tokens = Tokens(torch.randn(2, 8).to(torch.bfloat16), ids, torch.ones(2, 1))
    group.feed([tokens] * 2)
    group.library.call("ep_window_abort", group.ranks[0].window.address)
    alone.send()
    assert group.ranks[0].state().status == ABORTED
