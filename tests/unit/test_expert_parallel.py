"""Expert parallelism on the CPU twin: what comes back is what plain torch computes, whatever the group is like."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from barista.errors import ConfigError
from experts.expert_parallel.library import KernelError
from experts.expert_parallel.memory import Block
from experts.expert_parallel.rank import Ranks
from experts.expert_parallel.shape import ExpertMap, GroupShape
from experts.expert_parallel.structs import ABORTED, BAD_ID, OVERFLOW, UNREACHABLE
from tests.unit.expert_parallel import (
    Group,
    Tokens,
    an_expert,
    arrival,
    as_it_is,
    assert_a_silent_rank_is_given_up,
    expected,
    groups,
    quantised,
    random_tokens,
    same,
)

DTYPES = (torch.float32, torch.bfloat16)


@given(groups())
@settings(deadline=None, max_examples=150)
def test_every_rank_gets_what_torch_computes(case: tuple[GroupShape, ExpertMap, list[Tokens]]) -> None:
    shape, experts, tokens = case
    group = Group(shape, experts)
    for _ in range(2):  # the second layer meets what the first has left behind
        answers = group.layer(tokens)
        for mine, (output, failed) in zip(tokens, answers, strict=True):
            wanted, lost = expected(mine, experts, shape.combine, arrival(shape))
            assert same(output, wanted)
            assert torch.equal(failed.bool(), lost)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wire", ["values", "fp8"])
def test_all_tokens_may_go_to_one_expert(dtype: torch.dtype, wire: str) -> None:
    shape = GroupShape(num_ranks=8, num_experts=12, max_local_experts=2, top_k=1, hidden_size=128, max_tokens=40,
                       dtype=dtype, wire=wire)  # fmt: skip
    experts = ExpertMap.even(12, range(8), 8)
    tokens = [
        Tokens(torch.randn(40, 128).to(dtype), torch.full((40, 1), 7, dtype=torch.int32), torch.rand(40, 1))
        for _ in range(8)
    ]
    group = Group(shape, experts)
    for mine, (output, failed) in zip(tokens, group.layer(tokens), strict=True):
        wanted, _ = expected(mine, experts, "exact", arrival(shape))
        assert same(output, wanted)
        assert not failed.any()


@pytest.mark.parametrize("num_sources", [None, 1])
def test_an_engine_without_experts_has_workers_without_tokens(num_sources: int | None) -> None:
    shape = GroupShape(num_ranks=4, num_experts=10, max_local_experts=4, top_k=3, hidden_size=64, max_tokens=17,
                       num_sources=num_sources)  # fmt: skip
    experts = ExpertMap.even(10, [1, 2, 3], 4)
    generator = torch.Generator().manual_seed(1)
    tokens = [random_tokens(generator, n, 64, 10, 3, torch.bfloat16) for n in (17, 0, 0, 0)]
    (output, failed), *others = Group(shape, experts).layer(tokens)
    assert same(output, expected(tokens[0], experts, "exact", as_it_is)[0])
    assert not failed.any()
    assert all(len(rows) == 0 for rows, _ in others)


@given(st.integers(0, 2**31), st.sampled_from([2.0**-140, 2.0**-12, 1.0, 1e4, 3e38]), st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=60)
def test_fp8_bytes_on_the_wire_are_torchs(seed: int, size: float, dtype: torch.dtype) -> None:
    shape = GroupShape(num_ranks=1, num_experts=1, max_local_experts=1, top_k=1, hidden_size=256, max_tokens=8,
                       dtype=dtype, wire="fp8")  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-16, 1, (8, 256), generator=generator).float())
    rows = (torch.randn(8, 256, generator=generator).clamp(-1, 1) * spread * size).to(dtype)
    group = Group(shape, ExpertMap.of([0], 1))
    group.feed([Tokens(rows, torch.zeros(8, 1, dtype=torch.int32), torch.ones(8, 1))])
    group.together.send()
    codes, scales = quantised(rows)
    window, (_, at) = group.ranks[0].window.tensor(), group.library.window_bytes(shape.struct())
    assert same(window[at.rows :][: codes.numel()].view(codes.dtype).view(codes.shape), codes)
    assert same(window[at.scales :][: scales.numel() * 4].view(scales.dtype).view(scales.shape), scales)


def test_rows_come_to_an_expert_in_order_of_source_and_token() -> None:
    shape = GroupShape(num_ranks=3, num_experts=2, max_local_experts=2, top_k=1, hidden_size=8, max_tokens=5,
                       dtype=torch.float32, alignment=4)  # fmt: skip
    group = Group(shape, ExpertMap.of([1, 1], 3))
    chosen = [[0, 1, 0], [1, 1, 1, 0, 0], [0]]
    tokens, start = [], 0
    for ids in chosen:
        rows = torch.arange(start, start + len(ids), dtype=torch.float32)[:, None].expand(-1, 8).contiguous()
        tokens.append(Tokens(rows, torch.tensor(ids, dtype=torch.int32)[:, None], torch.ones(len(ids), 1)))
        start += len(ids)
    group.feed(tokens)
    group.together.send()
    owner = group.ranks[1]
    assert owner.expert_ends.tolist() == [8, 12]  # five rows and four, each begun at a multiple of four
    assert owner.expert_rows[:5, 0].tolist() == [0, 2, 6, 7, 8]
    assert owner.expert_rows[8:12, 0].tolist() == [1, 3, 4, 5]


def test_a_row_that_is_not_finite_fails_its_own_token_alone() -> None:
    shape = GroupShape(num_ranks=2, num_experts=4, max_local_experts=2, top_k=2, hidden_size=8, max_tokens=4)
    experts = ExpertMap.even(4, [0, 1], 2)
    generator = torch.Generator().manual_seed(3)
    tokens = [random_tokens(generator, 4, 8, 4, 2, torch.bfloat16) for _ in range(2)]
    tokens[0].topk_ids[:] = torch.tensor([0, 3])
    tokens[0].hidden_states[2, 5] = float("nan")
    answers = Group(shape, experts).layer(tokens)
    assert answers[0][1].tolist() == [0, 0, 1, 0]
    assert not answers[0][0][2].any()
    assert answers[1][1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("bad", "status"), [(4, BAD_ID), (-2, BAD_ID), (3, UNREACHABLE)])
def test_an_id_that_nobody_computes_fails_its_token_and_is_told(bad: int, status: int) -> None:
    shape = GroupShape(num_ranks=2, num_experts=4, max_local_experts=2, top_k=2, hidden_size=8, max_tokens=4)
    group = Group(shape, ExpertMap.of([0, 1, 1, -1], 2))
    ids = torch.tensor([[0, 1], [bad, 2], [1, 2]], dtype=torch.int32)
    tokens = Tokens(torch.randn(3, 8).to(torch.bfloat16), ids, torch.rand(3, 2))
    nothing = Tokens(tokens.hidden_states[:0], ids[:0], tokens.topk_weights[:0])
    (output, failed), _ = group.layer([tokens, nothing])
    assert failed.tolist() == [0, 1, 0]
    assert not output[1].any()
    assert group.ranks[0].state().status == status


def test_more_expert_rows_than_there_is_room_for_fail_their_tokens_and_are_told() -> None:
    shape = GroupShape(
        num_ranks=1, num_experts=2, max_local_experts=2, top_k=1, hidden_size=8, max_tokens=4, max_rows=3
    )
    group = Group(shape, ExpertMap.of([0, 0], 1))
    ids = torch.tensor([[0], [1], [1], [0]], dtype=torch.int32)
    tokens = Tokens(torch.randn(4, 8).to(torch.bfloat16), ids, torch.ones(4, 1))
    ((output, failed),) = group.layer([tokens])
    assert failed.tolist() == [0, 1, 1, 0]
    assert same(output[::3], an_expert(0, tokens.hidden_states[::3]))
    assert group.ranks[0].state().status == OVERFLOW


def test_a_rank_that_never_comes_is_given_up_and_its_pairs_fail() -> None:
    assert_a_silent_rank_is_given_up(None, "cpu")


def test_a_rank_that_comes_too_late_disturbs_nobody() -> None:
    shape = GroupShape(num_ranks=3, num_experts=3, max_local_experts=1, top_k=1, hidden_size=8, max_tokens=4)
    experts = ExpertMap.of([0, 1, 2], 3)
    group = Group(shape, experts, timeout=0.05)
    here, late = (Ranks(group.library, ranks) for ranks in (group.ranks[:2], group.ranks[2:]))
    generator = torch.Generator().manual_seed(9)

    def draw(num_experts: int) -> Tokens:
        ids = torch.randint(0, num_experts, (4, 1), generator=generator, dtype=torch.int32)
        return Tokens(torch.randn(4, 8, generator=generator).to(torch.bfloat16), ids, torch.rand(4, 1))

    group.feed([draw(3) for _ in range(3)])
    here.send()  # gives the third one up
    group.compute()
    here.receive()
    for _ in range(3):
        tokens = [draw(2), draw(2), draw(3)]
        answers = group.feed(tokens)
        here.route()
        here.dispatch()
        late.send()  # writes into windows of those that have given it up, between their own steps
        here.sync_dispatch()
        here.expand()
        group.compute()
        late.receive()
        here.receive()
        for mine, (output, failed) in zip(tokens[:2], answers[:2], strict=True):
            assert same(output, expected(mine, experts, "exact", as_it_is)[0])
            assert not failed.any()


def test_an_abort_ends_a_wait_and_all_later_ones() -> None:
    shape = GroupShape(num_ranks=2, num_experts=2, max_local_experts=1, top_k=1, hidden_size=8, max_tokens=2)
    group = Group(shape, ExpertMap.of([0, 1], 2), timeout=3600.0)
    alone = Ranks(group.library, group.ranks[:1])
    tokens = Tokens(torch.randn(2, 8).to(torch.bfloat16), torch.tensor([[0], [1]], dtype=torch.int32), torch.ones(2, 1))
    (_, failed), _ = group.feed([tokens] * 2)
    group.library.call("ep_window_abort", group.ranks[0].window.address)
    alone.send()
    group.compute()
    alone.receive()
    assert failed.tolist() == [0, 1]
    assert group.ranks[0].state().status == ABORTED


def test_epochs_may_wrap_around() -> None:
    shape = GroupShape(num_ranks=2, num_experts=2, max_local_experts=1, top_k=1, hidden_size=8, max_tokens=2)
    experts = ExpertMap.of([1, 0], 2)
    group = Group(shape, experts)
    for rank in group.ranks:
        rank._state[1] = -2  # the last epoch but one
    ids = torch.tensor([[0], [1]], dtype=torch.int32)
    tokens = [Tokens(torch.randn(2, 8).to(torch.bfloat16), ids, torch.rand(2, 1)) for _ in range(2)]
    for _ in range(4):
        for mine, (output, failed) in zip(tokens, group.layer(tokens), strict=True):
            assert same(output, expected(mine, experts, "exact", as_it_is)[0])
            assert not failed.any()
    assert group.ranks[0].state().epoch == 2


GOOD = {"num_ranks": 2, "num_experts": 4, "max_local_experts": 2, "top_k": 2, "hidden_size": 128, "max_tokens": 8}


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"num_ranks": 17}, "num_ranks is 17"),
        ({"num_ranks": 0}, "num_ranks is 0"),
        ({"top_k": 5}, "top_k is 5"),
        ({"max_local_experts": 4097}, "max_local_experts is 4097"),
        ({"hidden_size": 12, "dtype": torch.bfloat16}, "24 bytes"),
        ({"hidden_size": 72, "wire": "fp8"}, "hidden_size is 72"),
        ({"dtype": torch.float16}, "float16"),
        ({"to_all": True}, "to_all"),
        ({"max_rows": 3, "alignment": 2}, "max_rows is 3"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"num_sources": 3}, "num_sources is 3"),
    ],
)
def test_a_shape_that_the_kernels_do_not_take_is_refused_by_name(wrong: dict[str, object], names: str) -> None:
    with pytest.raises(ConfigError) as refused:
        GroupShape(**(GOOD | wrong))
    assert names in refused.value.message
    assert refused.value.remedy


def test_the_kernels_take_every_shape_that_is_not_refused() -> None:
    group = Group(GroupShape(**GOOD), ExpertMap.even(4, [0, 1], 2))
    assert group.ranks[0].window.size > 0


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (
            lambda t: Tokens(t.hidden_states.repeat(3, 1), t.topk_ids.repeat(3, 1), t.topk_weights.repeat(3, 1)),
            "12 tokens",
        ),
        (lambda t: Tokens(t.hidden_states.float(), t.topk_ids, t.topk_weights), "hidden_states"),
        (lambda t: Tokens(t.hidden_states, t.topk_ids.long(), t.topk_weights), "topk_ids"),
        (lambda t: Tokens(t.hidden_states, t.topk_ids, t.topk_weights[:, :1]), "topk_weights"),
        (lambda t: Tokens(t.hidden_states.t().contiguous().t(), t.topk_ids, t.topk_weights), "hidden_states"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_anything_is_sent(change, names: str) -> None:
    group = Group(GroupShape(**GOOD), ExpertMap.even(4, [0, 1], 2))
    tokens = random_tokens(torch.Generator().manual_seed(0), 4, 128, 4, 2, torch.bfloat16)
    before = group.ranks[0].window.tensor().clone()
    with pytest.raises(ConfigError) as refused:
        group.ranks[0].feed(*vars(change(tokens)).values())
    assert names in refused.value.message
    assert torch.equal(group.ranks[0].window.tensor(), before)


def test_a_rank_that_is_no_source_may_send_nothing() -> None:
    group = Group(GroupShape(**(GOOD | {"num_sources": 1})), ExpertMap.even(4, [0, 1], 2))
    tokens = random_tokens(torch.Generator().manual_seed(0), 4, 128, 4, 2, torch.bfloat16)
    group.ranks[1].feed(tokens.hidden_states, tokens.topk_ids, tokens.topk_weights)
    with pytest.raises(KernelError, match="contradict"):
        Ranks(group.library, group.ranks[1:]).route()


def test_a_rank_without_experts_has_no_memory_for_the_rows_of_others() -> None:
    group = Group(GroupShape(**GOOD), ExpertMap.of([1, 1, -1, -1], 2))
    assert group.ranks[0].window.size < group.ranks[1].window.size / 4


def test_owners_have_nothing_to_do_with_one_another() -> None:
    shape = GroupShape(
        num_ranks=3, num_experts=4, max_local_experts=2, top_k=2, hidden_size=8, max_tokens=6, num_sources=1
    )
    experts = ExpertMap.of([1, 2, 1, 2], 3)
    group = Group(shape, experts, timeout=0.2)
    engine, *owners = group.ranks
    for owner in owners:
        windows: list[Block | None] = [engine.window, None, None]
        windows[owner.rank] = owner.window
        owner.join(windows)
    nothing = torch.empty(0, 8, dtype=torch.bfloat16), torch.empty(0, 2, dtype=torch.int32), torch.empty(0, 2)
    tokens = random_tokens(torch.Generator().manual_seed(6), 6, 8, 4, 2, torch.bfloat16)
    for _ in range(3):
        (output, failed), *_ = group.feed([tokens, Tokens(*nothing), Tokens(*nothing)])
        group.together.send()
        group.compute()
        group.together.receive()
        assert same(output, expected(tokens, experts, "exact", as_it_is)[0])
        assert not failed.any()
    assert [rank.state().status for rank in group.ranks] == [0, 0, 0]


def test_a_call_that_contradicts_itself_changes_nothing() -> None:
    group = Group(GroupShape(**GOOD), ExpertMap.even(4, [0, 1], 2))
    before = group.ranks[0].window.tensor().clone()
    group.ranks[0].struct.num_tokens = 9  # more than there is room for
    with pytest.raises(KernelError, match="contradict"):
        group.together.dispatch()
    assert torch.equal(group.ranks[0].window.tensor(), before)


@st.composite
def losses(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """Experts, and what each survivor has of them."""
    num_experts, num_owners = draw(st.integers(1, 40)), draw(st.integers(1, 8))
    owners = draw(st.lists(st.integers(-1, num_owners - 1), min_size=num_experts, max_size=num_experts))
    return num_experts, [[e for e, owner in enumerate(owners) if owner == rank] for rank in range(num_owners)]


@given(losses())
def test_what_the_lost_had_is_dealt_evenly_and_the_rest_stays(case: tuple[int, list[list[int]]]) -> None:
    num_experts, shares = case
    experts = ExpertMap.redealt(num_experts, shares, len(shares) + 1)
    after = [experts.local(rank + 1) for rank in range(len(shares))]
    assert sorted(expert for share in after for expert in share) == list(range(num_experts))
    assert all(set(before) <= set(now) for before, now in zip(shares, after, strict=True))
    even = -(-num_experts // len(shares))
    assert all(len(now) <= max(even, len(before)) for before, now in zip(shares, after, strict=True))


def test_an_expert_map_numbers_each_ranks_experts_in_order() -> None:
    experts = ExpertMap.of([1, 0, 1, -1, 1], 2)
    assert experts.indices == (0, 0, 1, -1, 2)
    assert (experts.local(0), experts.local(1), experts.most()) == ((1,), (0, 2, 4), 3)
    assert [ExpertMap.even(10, [1, 2, 3], 4).ranks.count(rank) for rank in range(4)] == [0, 4, 3, 3]
    with pytest.raises(ConfigError, match="expert 1 is on rank 2"):
        ExpertMap.of([0, 2], 2)
