"""Groups of virtual ranks in one process, and what a layer of theirs must give: plain torch, pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from experts.expert_parallel.library import Library, cpu_library
from experts.expert_parallel.memory import GpuMemory, Memory, PrivateMemory
from experts.expert_parallel.rank import Rank, Ranks
from experts.expert_parallel.shape import ExpertMap, GroupShape
from experts.expert_parallel.structs import TIMED_OUT, UNREACHABLE

# (expert, rows [n, hidden]) -> rows [n, hidden]: an expert that a test can compute for itself, row by row.
Expert = Callable[[int, Tensor], Tensor]


def an_expert(expert: int, rows: Tensor) -> Tensor:
    """Another for each id, and of each row alone; exact in bfloat16 only by rounding, as a real one is."""
    return (rows.float().roll(expert, dims=1) * (1.0 + expert / 8) + expert / 16).to(rows.dtype)


@dataclass(frozen=True)
class Tokens:
    """A rank's layer. hidden_states: [n, hidden]. topk_ids: [n, k] int32. topk_weights: [n, k] float32."""

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor


class Group:
    """All ranks of a group, driven together."""

    def __init__(
        self,
        shape: GroupShape,
        experts: ExpertMap,
        library: Library | None = None,
        device: str = "cpu",
        timeout: float = 10.0,
    ) -> None:
        self.library = library or cpu_library()
        self.device = torch.device(device)
        memory: Memory = PrivateMemory() if device == "cpu" else GpuMemory(self.library, self.device.index or 0)
        self.shape, self.experts = shape, experts
        self.ranks = [
            Rank(self.library, memory, self.device, shape, experts, rank, timeout=timeout)
            for rank in range(shape.num_ranks)
        ]
        for rank in self.ranks:
            rank.join([peer.window for peer in self.ranks])
        self.together = Ranks(self.library, self.ranks)

    def layer(self, tokens: Sequence[Tokens], expert: Expert = an_expert) -> list[tuple[Tensor, Tensor]]:
        """One layer of all ranks: (output, failed) of each."""
        answers = self.feed(tokens)
        self.together.send()
        self.compute(expert)
        self.together.receive()
        return answers

    def close(self) -> None:
        """Give the windows back: a GPU's are nobody's garbage."""
        for rank in self.ranks:
            rank.close()

    def feed(self, tokens: Sequence[Tokens]) -> list[tuple[Tensor, Tensor]]:
        return [
            rank.feed(
                mine.hidden_states.to(self.device), mine.topk_ids.to(self.device), mine.topk_weights.to(self.device)
            )
            for rank, mine in zip(self.ranks, tokens, strict=True)
        ]

    def compute(self, expert: Expert = an_expert) -> None:
        """Every rank's experts on what has come."""
        for rank in self.ranks:
            start, results = 0, torch.zeros(rank.expert_rows.shape, dtype=self.shape.dtype, device=self.device)
            for local, name in enumerate(self.experts.local(rank.rank)):
                end = int(rank.expert_ends[local])
                results[start:end] = expert(name, rank.expert_rows[start:end])
                start = end
            rank.results(results)


def expected(
    tokens: Tokens, experts: ExpertMap, combine: str, arrive: Callable[[Tensor], Tensor], expert: Expert = an_expert
) -> tuple[Tensor, Tensor]:
    """What a source must get back: (output [n, hidden], failed [n] bool). arrive: what the wire does to rows.

    exact: weighted rows in top-k order. partial: one rounded sum for each owner, added in order of the ranks.
    """
    rows = arrive(tokens.hidden_states)
    dtype = tokens.hidden_states.dtype
    output, failed = torch.zeros_like(tokens.hidden_states), torch.zeros(len(rows), dtype=torch.bool)
    for t, (ids, weights) in enumerate(zip(tokens.topk_ids.tolist(), tokens.topk_weights, strict=True)):
        failed[t] = any(i != -1 and (not 0 <= i < len(experts.ranks) or experts.ranks[i] < 0) for i in ids)
        if failed[t]:
            continue
        sums: dict[int, Tensor] = {}
        for i, weight in zip(ids, weights, strict=True):
            if i == -1:
                continue
            owner = experts.ranks[i] if combine == "partial" else 0
            row = expert(i, rows[t : t + 1])[0].float()
            sums[owner] = sums.get(owner, torch.zeros_like(row)) + row * weight
        if combine == "partial":
            total = sum((sums[owner].to(dtype).float() for owner in sorted(sums)), torch.zeros(rows.shape[1]))
        else:
            total = sums.get(0, torch.zeros(rows.shape[1]))
        output[t] = total.to(dtype)
        failed[t] = not bool(output[t].isfinite().all())
    output[failed] = 0
    return output, failed


def as_it_is(rows: Tensor) -> Tensor:
    return rows


def arrival(shape: GroupShape) -> Callable[[Tensor], Tensor]:
    """What this group's wire does to rows."""
    return through_fp8 if shape.wire == "fp8" else as_it_is


def through_fp8(rows: Tensor) -> Tensor:
    """There and back: e4m3 with one scale for 128 channels, by torch's own casts."""
    codes, scales = quantised(rows)
    groups = codes.float().view(len(rows), rows.shape[1] // 128, 128) * scales[..., None]
    return groups.view_as(rows).to(rows.dtype)


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """codes [n, hidden] float8_e4m3fn and scales [n, hidden / 128] float32."""
    groups = rows.float().view(len(rows), rows.shape[1] // 128, 128)
    amax = groups.abs().amax(-1).clamp(min=1e-4)
    most = torch.full_like(amax, 448.0)  # a number divided by a tensor is not divided: torch multiplies by the inverse
    codes = (groups * (most / amax)[..., None]).to(torch.float8_e4m3fn)
    return codes.view(rows.shape), amax / most


def same(found: Tensor, wanted: Tensor) -> bool:
    """Byte for byte."""
    return torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


def random_tokens(
    generator: torch.Generator, num_tokens: int, hidden: int, num_experts: int, top_k: int, dtype: torch.dtype
) -> Tokens:
    """Distinct ids, some of them missing."""
    order = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k].to(torch.int32)
    missing = torch.rand(order.shape, generator=generator) < 0.1
    return Tokens(
        torch.randn(num_tokens, hidden, generator=generator).to(dtype),
        order.masked_fill(missing, -1).contiguous(),
        torch.rand(num_tokens, top_k, generator=generator),
    )


@st.composite
def groups(draw: st.DrawFn) -> tuple[GroupShape, ExpertMap, list[Tokens]]:
    num_ranks = draw(st.integers(1, 8))
    num_experts = draw(st.integers(1, 19))
    top_k = draw(st.integers(1, min(6, num_experts)))
    wire = draw(st.sampled_from(["values", "fp8"]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    hidden = draw(st.sampled_from([128, 256])) if wire == "fp8" else draw(st.sampled_from([8, 24, 136]))
    owners = draw(st.lists(st.integers(0, num_ranks - 1), min_size=num_experts, max_size=num_experts))
    experts = ExpertMap.of(owners, num_ranks)
    combine = draw(st.sampled_from(["exact", "partial"]))
    shape = GroupShape(
        num_ranks=num_ranks,
        num_experts=num_experts,
        max_local_experts=experts.most(),
        top_k=top_k,
        hidden_size=hidden,
        max_tokens=draw(st.sampled_from([9, 16])),
        dtype=dtype,
        wire=wire,
        combine=combine,
        to_all=combine == "partial" and draw(st.booleans()),
        alignment=draw(st.sampled_from([1, 8])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens = [
        random_tokens(generator, draw(st.integers(0, 9)), hidden, num_experts, top_k, dtype) for _ in range(num_ranks)
    ]
    return shape, experts, tokens


def assert_a_silent_rank_is_given_up(library: Library | None, device: str) -> None:
    """The third rank of a group never comes: the others go on without it, and only its pairs fail."""
    shape = GroupShape(num_ranks=3, num_experts=3, max_local_experts=1, top_k=2, hidden_size=8, max_tokens=3)
    group = Group(shape, ExpertMap.of([0, 1, 2], 3), library, device, timeout=0.05)
    here = Ranks(group.library, group.ranks[:2])
    ids = torch.tensor([[0, 1], [1, 2], [2, 0]], dtype=torch.int32)
    tokens = Tokens(torch.randn(3, 8).to(torch.bfloat16), ids, torch.rand(3, 2))
    answers = group.feed([tokens] * 3)
    here.send()
    group.compute()
    here.receive()
    for rank, (_, failed) in zip(group.ranks[:2], answers[:2], strict=True):
        assert failed.tolist() == [0, 1, 1]
        assert (rank.state().alive, rank.state().status) == (0b011, TIMED_OUT)
    here.send()  # it is not waited for again, and its pairs are known to be lost before they are sent
    group.compute()
    here.receive()
    assert answers[0][1].tolist() == [0, 1, 1]
    assert group.ranks[0].state().status == TIMED_OUT | UNREACHABLE
    group.close()
