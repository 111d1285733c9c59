"""DeepSeek's balancer gives DeepSeek's answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from barista.balance import plan
from barista.eplb import rebalance_experts
from barista.placement import Placement, WorkerCapacity

GOLDEN = Path(__file__).parents[1] / "golden" / "eplb.json"


def test_the_published_example_is_reproduced():
    golden = json.loads(GOLDEN.read_text())
    shape = [golden[name] for name in ("num_replicas", "num_groups", "num_nodes", "num_gpus")]
    phy2log, _, _ = rebalance_experts(np.array(golden["weight"]), *shape)
    assert phy2log.tolist() == golden["phy2log"]


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_the_three_maps_agree(data):
    nodes = data.draw(st.sampled_from([1, 2, 3]))
    gpus = nodes * data.draw(st.sampled_from([1, 2]))
    replicas = 12 + gpus * data.draw(st.integers(0, 3)) + (-12) % gpus
    weight = np.array(data.draw(st.lists(st.integers(0, 1000), min_size=24, max_size=24))).reshape(2, 12)
    phy2log, log2phy, logcnt = rebalance_experts(weight, replicas, data.draw(st.sampled_from([1, 4])), nodes, gpus)
    for layer in range(2):
        assert logcnt[layer].tolist() == np.bincount(phy2log[layer], minlength=12).tolist()
        for expert in range(12):
            slots = [slot for slot in log2phy[layer, expert] if slot >= 0]
            assert sorted(slots) == np.flatnonzero(phy2log[layer] == expert).tolist()


@pytest.mark.parametrize(("shape", "message"), [((8, 1, 1, 8), "do not fit"), ((13, 1, 1, 8), "do not divide")])
def test_numbers_that_do_not_divide_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        rebalance_experts(np.ones((1, 12)), *shape)


def fleet(*capacities):
    return [WorkerCapacity(f"w{number}", capacity) for number, capacity in enumerate(capacities)]


def test_as_a_policy_it_covers_every_expert_and_a_second_plan_moves_nothing():
    load = {(layer, expert): float((7 * expert + layer) % 12) for layer in range(2) for expert in range(12)}
    workers, sizes = fleet(80, 80, 90, 80), {0: 10, 1: 10}
    first = plan(load, Placement.empty({0: 12, 1: 12}), workers, sizes, redundancy=1, policy="eplb")
    assert not first.uncovered
    second = plan(load, Placement(1, first.target, {}), workers, sizes, redundancy=1, policy="eplb")
    assert (second.loads, second.releases) == ((), ())


@pytest.mark.parametrize(
    ("workers", "sizes", "budget", "message"),
    [
        (fleet(80, 80), {0: 10, 1: 20}, None, "bytes"),
        (fleet(80, 20), {0: 10, 1: 10}, None, "do not hold 12 experts"),
        ([], {0: 10, 1: 10}, None, "do not hold 12 experts"),
        (fleet(240, 240), {0: 10, 1: 10}, 3, "move budget"),
    ],
)
def test_what_it_cannot_do_as_a_policy_is_refused(workers, sizes, budget, message):
    empty = Placement.empty({0: 12, 1: 12})
    with pytest.raises(ValueError, match=message):
        plan({}, empty, workers, sizes, redundancy=1, move_budget=budget, policy="eplb")
