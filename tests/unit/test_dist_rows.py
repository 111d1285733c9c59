"""The tensors of a layer between ranks: split, packed and added up as slow loops do it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.transport.dist_rows import combine_anywhere, combine_on_cpu, pack, places_of, split_rows, unpack
from tests.kernel_variants import DTYPES, few, values


def choices(num_tokens: int, top_k: int, num_experts: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, num_experts, (num_tokens, top_k), generator=generator, dtype=torch.int32)


@few
@given(
    num_tokens=st.integers(0, 8),
    top_k=st.integers(1, 5),
    num_experts=st.integers(1, 9),
    num_ranks=st.integers(2, 5),
    seed=st.integers(0, 2**31),
)
def test_every_pair_goes_to_the_rank_of_its_expert_and_its_row_is_found_again(
    num_tokens, top_k, num_experts, num_ranks, seed
):
    topk_ids = choices(num_tokens, top_k, num_experts, seed)
    owner = torch.randint(1, num_ranks, (num_experts,), generator=torch.Generator().manual_seed(seed))
    tokens, ids, num_rows, num_pairs, came_back = [], [], [0] * num_ranks, [0] * num_ranks, []
    for rank in range(num_ranks):
        for token, chosen in enumerate(topk_ids.tolist()):
            theirs = [expert if expert >= 0 and owner[expert] == rank else -1 for expert in chosen]
            if max(theirs) >= 0:
                tokens.append(token)
                ids.append(theirs)
                num_rows[rank] += 1
            for place, expert in enumerate(theirs):
                if expert >= 0:
                    num_pairs[rank] += 1
                    came_back.append((token, place))
    split = split_rows(topk_ids, owner, num_ranks)
    assert split.tokens.tolist() == tokens
    assert split.topk_ids.tolist() == ids
    assert (split.num_rows, split.num_pairs) == (num_rows, num_pairs)
    assert split.topk_ids.dtype is torch.int32
    for token in range(num_tokens):
        for place in range(top_k):
            found = came_back.index((token, place)) if (token, place) in came_back else -1
            assert split.places[token, place] == found


def test_places_number_what_is_chosen_in_order():
    chosen = torch.tensor([[True, False, True], [False, False, False], [True, True, False]])
    assert places_of(chosen).tolist() == [[0, -1, 1], [-1, -1, -1], [2, 3, -1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 5])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_a_message_holds_what_was_packed(dtype, num_rows, width):
    ids, rows = choices(num_rows, 3, 9, seed=1), values(num_rows, width, dtype=dtype)
    message = pack(ids, rows)
    assert message.shape == (num_rows, 12 + width * dtype.itemsize)
    unpacked_ids, unpacked_rows = unpack(message, (torch.int32, 3), (dtype, width))
    assert torch.equal(unpacked_ids, ids)
    assert torch.equal(unpacked_rows, rows)
    assert unpacked_rows.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(num_tokens=st.integers(0, 8), top_k=st.integers(1, 8), hidden=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_combining_on_the_cpu_has_the_bytes_of_combining_anywhere(dtype, num_tokens, top_k, hidden, seed):
    places = places_of(choices(num_tokens, top_k, 4, seed) >= 0)
    num_pairs = int((places >= 0).sum())
    rows = values(num_pairs + 1, hidden, dtype=dtype, seed=seed)
    rows[: num_pairs // 3, 0] = (torch.nan, torch.inf, 1.0)[seed % 3]
    rows[-1] = 0
    topk_weights = values(num_tokens, top_k, seed=seed + 1)
    fast, fast_failed = combine_on_cpu(rows, places, topk_weights)
    slow, slow_failed = combine_anywhere(rows, places, topk_weights)
    assert torch.equal(fast.view(torch.uint8), slow.view(torch.uint8))
    assert torch.equal(fast_failed, slow_failed)


def test_the_weight_of_a_pair_without_an_expert_says_nothing():
    rows, places = torch.tensor([[2.0], [0.0]]), torch.tensor([[0, -1]])
    total, failed = combine_anywhere(rows, places, torch.tensor([[0.5, torch.nan]]))
    assert (total.tolist(), failed.tolist()) == ([[1.0]], [False])
