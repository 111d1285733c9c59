"""Which worker computes which expert, and the lists that go to it and come back, in every variant of this machine."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts import kernels
from experts.kernels import reference_routing
from tests.kernel_variants import variant  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("variant")

many = settings(max_examples=150, deadline=None, database=None, derandomize=True)


@st.composite
def batches(draw) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """topk_ids, replicas, cost, expert_cost. Some experts have no holder, some workers hold nothing."""
    num_experts, num_workers = draw(st.integers(1, 40)), draw(st.integers(1, 6))
    n, k, num_replicas = draw(st.integers(0, 30)), draw(st.integers(1, 8)), draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    topk_ids = random.integers(-1, num_experts, (n, k), dtype=np.int32)
    replicas = random.integers(-1, num_workers, (num_experts, num_replicas), dtype=np.int32)
    cost = random.choice(np.array([0.5, 1, 1, 2, np.inf], np.float32), num_workers)
    return topk_ids, replicas, cost, draw(st.sampled_from([0.0, 0.3, 8.0]))


def finishing_times(topk_ids, owner, cost, expert_cost) -> np.ndarray:
    rows = np.bincount(topk_ids[topk_ids >= 0], minlength=len(owner))
    finish = np.zeros(len(cost))
    for expert, worker in enumerate(owner.tolist()):
        if worker >= 0:
            finish[worker] += (expert_cost + rows[expert]) * cost[worker]
    return finish


@many
@given(batches())
def test_each_expert_that_is_asked_for_has_one_owner_among_its_holders(batch):
    topk_ids, replicas, cost, expert_cost = batch
    owner = kernels.route(torch.from_numpy(topk_ids), replicas, cost, expert_cost)
    assert owner.dtype == np.int32
    for expert, worker in enumerate(owner.tolist()):
        holders = set(replicas[expert].tolist()) - {-1}
        if expert not in topk_ids:
            assert worker == -1
        elif not holders:
            assert worker == -2
        else:
            assert worker in holders


@many
@given(batches())
def test_route_equals_its_reference(batch):
    topk_ids, replicas, cost, expert_cost = batch
    owner = kernels.route(topk_ids, replicas, cost, expert_cost)
    assert np.array_equal(owner, reference_routing.route(topk_ids, replicas, cost, expert_cost))


@many
@given(batches(), st.randoms(use_true_random=False))
def test_the_order_of_tokens_and_of_replicas_changes_no_owner(batch, random):
    topk_ids, replicas, cost, expert_cost = batch
    pairs, columns = topk_ids.ravel().tolist(), list(range(replicas.shape[1]))
    random.shuffle(pairs)
    random.shuffle(columns)
    shuffled = np.array(pairs, np.int32).reshape(topk_ids.shape)
    expected = kernels.route(topk_ids, replicas, cost, expert_cost)
    assert np.array_equal(kernels.route(shuffled, replicas[:, columns].copy(), cost, expert_cost), expected)


@many
@given(batches())
def test_a_worker_of_infinite_cost_owns_only_what_nobody_else_holds(batch):
    topk_ids, replicas, cost, expert_cost = batch
    owner = kernels.route(topk_ids, replicas, cost, expert_cost)
    for expert, worker in enumerate(owner.tolist()):
        if worker >= 0 and np.isinf(cost[worker]):
            assert all(np.isinf(cost[other]) for other in replicas[expert] if other >= 0)


@settings(many, max_examples=60)
@given(
    rows=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    cost=st.lists(st.sampled_from([0.5, 1.0, 1.5, 3.0]), min_size=2, max_size=3),
    expert_cost=st.sampled_from([0.0, 2.0]),
)
def test_free_choice_finishes_within_twice_the_best_time(rows, cost, expert_cost):
    """The bound of longest-processing-time scheduling on machines of unequal speed: Gonzalez, Ibarra, Sahni (1977)."""
    cost = np.array(cost, np.float32)
    topk_ids = np.repeat(np.arange(len(rows), dtype=np.int32), rows)[:, None]
    replicas = np.tile(np.arange(len(cost), dtype=np.int32), (len(rows), 1))
    owner = kernels.route(topk_ids, replicas, cost, expert_cost)
    every = itertools.product(range(len(cost)), repeat=len(rows))
    best = min(finishing_times(topk_ids, np.array(some), cost, expert_cost).max() for some in every)
    assert finishing_times(topk_ids, owner, cost, expert_cost).max() <= 2 * best + 1e-6


def test_experts_with_a_choice_go_round_those_without():
    """Worker 0 alone holds expert 2, so the lighter experts 0 and 1, on both, go to worker 1 while that is sooner."""
    topk_ids = np.array([[2], [2], [2], [2], [0], [1]], np.int32)
    replicas = np.array([[0, 1], [0, 1], [0, -1]], np.int32)
    owner = kernels.route(topk_ids, replicas, np.ones(2, np.float32), 0.5)
    assert owner.tolist() == [1, 1, 0]


def test_without_rows_to_tell_them_apart_experts_alternate_from_the_lowest():
    topk_ids = np.arange(4, dtype=np.int32)[:, None]
    replicas = np.tile(np.array([1, 0], np.int32), (4, 1))
    assert kernels.route(topk_ids, replicas, np.ones(2, np.float32), 8.0).tolist() == [0, 1, 0, 1]


@many
@given(batches())
def test_the_parts_of_the_workers_are_the_batch(batch):
    topk_ids, replicas, cost, expert_cost = batch
    owner = kernels.route(topk_ids, replicas, cost, expert_cost)
    union = np.full_like(topk_ids, -1)
    total = 0
    for worker in [-2, *range(len(cost))]:
        tokens, ids, num_pairs = kernels.split(torch.from_numpy(topk_ids), owner, worker)
        assert tokens.dtype == ids.dtype == np.int32
        assert (np.diff(tokens) > 0).all()
        assert (ids >= 0).any(-1).all()
        assert (owner[ids[ids >= 0]] == worker).all()
        assert num_pairs == (ids >= 0).sum()
        assert (union[tokens][ids >= 0] == -1).all()
        union[tokens] = np.where(ids >= 0, ids, union[tokens])
        total += num_pairs
        for ours, theirs in zip((tokens, ids), reference_routing.split(topk_ids, owner, worker), strict=False):
            assert np.array_equal(ours, theirs)
    assert np.array_equal(union, topk_ids)
    assert total == (topk_ids >= 0).sum()


@many
@given(batches())
def test_rows_are_placed_where_their_pairs_were_split_from(batch):
    topk_ids, replicas, cost, expert_cost = batch
    owner = kernels.route(topk_ids, replicas, cost, expert_cost)
    for worker in range(len(cost)):
        tokens, ids, num_pairs = kernels.split(topk_ids, owner, worker)
        addresses = np.full(topk_ids.shape, 5, np.int64)
        assert kernels.place_rows(addresses, tokens, ids, 1 << 45, 96) == num_pairs
        mine = (topk_ids >= 0) & (owner[topk_ids] == worker)
        expected = np.full(topk_ids.shape, 5, np.int64)
        expected[mine] = (1 << 45) + 96 * np.arange(num_pairs)
        assert np.array_equal(addresses, expected)
        addresses.fill(5)
        assert reference_routing.place_rows(addresses, tokens, ids, 1 << 45, 96) == num_pairs
        assert np.array_equal(addresses, expected)


@pytest.mark.parametrize("module", [kernels, reference_routing], ids=["compiled", "reference"])
def test_what_is_out_of_range_is_refused(module):
    replicas, cost = np.zeros((3, 1), np.int32), np.ones(1, np.float32)
    for bad in (3, -2):
        ids = np.array([[0, bad]], np.int32)
        with pytest.raises(ValueError, match="3"):
            module.route(ids, replicas, cost, 1.0)
        with pytest.raises(ValueError, match="3"):
            module.split(ids, np.zeros(3, np.int32), 0)
    for worker in (1, -2):
        with pytest.raises(ValueError, match="worker"):
            module.route(np.zeros((1, 1), np.int32), np.full((3, 1), worker, np.int32), cost, 1.0)
    addresses = np.zeros((2, 1), np.int64)
    for token in (2, -1):
        with pytest.raises(ValueError, match="token"):
            module.place_rows(addresses, np.array([0, token], np.int32), np.zeros((2, 1), np.int32), 1, 1)
    assert not addresses.any()


def test_arrays_that_may_not_be_written_are_read_and_strided_ones_are_refused():
    topk_ids, replicas = np.zeros((2, 2), np.int32), np.zeros((1, 1), np.int32)
    cost = np.ones(1, np.float32)
    for array in (topk_ids, replicas, cost):
        array.flags.writeable = False
    assert kernels.route(topk_ids, replicas, cost, 1.0).tolist() == [0]
    with pytest.raises((BufferError, AssertionError, TypeError)):
        kernels.route(np.zeros((2, 4), np.int32)[:, ::2], replicas, cost, 1.0)
