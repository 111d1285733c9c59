"""Which GPUs are neighbours, and that a plan is the best of all."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from barista.errors import ConfigError
from experts.health.nvml import Nvml
from experts.health.nvml_topology import read_topology
from experts.health.topology import GpuPlan, Peer, Topology, plan_gpus, score
from tests.unit.fake_nvml import FakeNvml

PEERS = st.builds(Peer, nvlinks=st.sampled_from([0, 0, 1, 2, 18]), p2p=st.sampled_from([None, False, True]))


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    gpus = tuple(sorted(draw(st.sets(st.integers(0, 15), min_size=1, max_size=6))))
    pairs = [pair for pair in combinations(gpus, 2) if draw(st.booleans())]
    return Topology(gpus, {pair: draw(PEERS) for pair in pairs})


@st.composite
def tasks(draw: st.DrawFn) -> tuple[Topology, int, int]:
    """A topology with room for so many trunk and worker GPUs."""
    topology = draw(topologies())
    num_trunk = draw(st.integers(1, len(topology.gpus)))
    return topology, num_trunk, draw(st.integers(0, len(topology.gpus) - num_trunk))


def all_plans(topology: Topology, num_trunk: int, num_workers: int) -> list[GpuPlan]:
    return [
        GpuPlan(trunk, workers)
        for trunk in combinations(topology.gpus, num_trunk)
        for workers in combinations(sorted(set(topology.gpus) - set(trunk)), num_workers)
    ]


# ---------------------------------------------------------------------- plans


@given(tasks())
def test_no_choice_of_gpus_is_better_than_the_plan(task: tuple[Topology, int, int]) -> None:
    best = max(score(task[0], plan) for plan in all_plans(*task))
    assert score(task[0], plan_gpus(*task)) == best


@given(tasks())
def test_a_plan_names_as_many_gpus_as_were_asked_for_and_each_once(task: tuple[Topology, int, int]) -> None:
    topology, num_trunk, num_workers = task
    plan = plan_gpus(*task)
    assert (len(plan.trunk), len(plan.workers)) == (num_trunk, num_workers)
    assert len({*plan.trunk, *plan.workers}) == num_trunk + num_workers
    assert {*plan.trunk, *plan.workers} <= set(topology.gpus)


@given(tasks())
def test_the_order_in_which_gpus_are_listed_changes_nothing(task: tuple[Topology, int, int]) -> None:
    topology, *counts = task
    assert plan_gpus(Topology(topology.gpus[::-1], topology.peers), *counts) == plan_gpus(topology, *counts)


@given(tasks(), st.data())
def test_an_excluded_gpu_is_not_used(task: tuple[Topology, int, int], data: st.DataObject) -> None:
    topology, num_trunk, num_workers = task
    excluded = data.draw(st.sampled_from(topology.gpus))
    left = Topology(tuple(gpu for gpu in topology.gpus if gpu != excluded), topology.peers)
    if len(left.gpus) < num_trunk + num_workers:
        with pytest.raises(ConfigError):
            plan_gpus(topology, num_trunk, num_workers, exclude=[excluded])
    else:
        assert plan_gpus(topology, num_trunk, num_workers, exclude=[excluded]) == plan_gpus(
            left, num_trunk, num_workers
        )


def test_the_workers_are_in_order_of_their_distance() -> None:
    peers = {(0, 3): Peer(nvlinks=2), (0, 2): Peer(nvlinks=4), (0, 1): Peer(p2p=True)}
    assert plan_gpus(Topology((0, 1, 2, 3), peers), 1, 3) == GpuPlan((0,), (2, 3, 1))


def test_a_few_links_to_every_worker_are_better_than_many_to_one() -> None:
    peers = {(0, 1): Peer(nvlinks=18), (2, 3): Peer(nvlinks=1), (2, 4): Peer(nvlinks=1)}
    assert plan_gpus(Topology((0, 1, 2, 3, 4), peers), 1, 2) == GpuPlan((2,), (3, 4))


def test_the_gpus_of_a_trunk_are_neighbours() -> None:
    assert plan_gpus(Topology((0, 1, 2, 3), {(1, 3): Peer(nvlinks=1)}), 2, 0) == GpuPlan((1, 3), ())


def test_equal_gpus_go_by_their_index() -> None:
    assert plan_gpus(Topology((3, 1, 2, 0), {}), 2, 1) == GpuPlan((0, 1), (2,))


def test_too_few_gpus_are_told_in_numbers() -> None:
    with pytest.raises(ConfigError, match=r"1 GPUs for the engine and 2 for workers .* 2 of 3"):
        plan_gpus(Topology((0, 1, 2), {}), 1, 2, exclude=[1])


def test_an_engine_without_a_gpu_is_no_engine() -> None:
    with pytest.raises(ValueError, match="0 GPUs"):
        plan_gpus(Topology((0,), {}), 0, 1)


# ---------------------------------------------------------------------- reading


def test_links_to_the_same_switches_connect_two_gpus() -> None:
    assert read_topology(Nvml(FakeNvml("h100_healthy"))) == Topology((0, 1), {(0, 1): Peer(nvlinks=18, p2p=True)})


def test_links_to_switches_that_the_driver_does_not_join_connect_nothing() -> None:
    fake = FakeNvml("h100_healthy")
    fake.change("nvmlDeviceGetP2PStatus", {"1": {"0": 0, "2": 5}})
    assert read_topology(Nvml(fake)).between(1, 0) == Peer(nvlinks=0, p2p=True)


def test_direct_links_are_those_to_the_other_gpus_address() -> None:
    fake = FakeNvml("a100_ecc")
    elsewhere = {"0-7": {"domain": 0, "bus": 75, "device": 0}, "8-11": {"domain": 1, "bus": 75, "device": 0}}
    fake.change("nvmlDeviceGetNvLinkRemotePciInfo", elsewhere)
    assert read_topology(Nvml(fake)).between(0, 1) == Peer(nvlinks=8, p2p=True)


def test_links_that_are_down_do_not_count() -> None:
    fake = FakeNvml("a100_ecc")
    fake.change("nvmlDeviceGetNvLinkState", {"0-5": 0, "6-11": 1})
    assert read_topology(Nvml(fake)).between(0, 1).nvlinks == 6


def test_gpus_without_nvlink_are_no_peers() -> None:
    assert read_topology(Nvml(FakeNvml("consumer"))).between(0, 1) == Peer(nvlinks=0, p2p=False)


def test_a_lost_gpu_is_not_in_the_topology() -> None:
    assert read_topology(Nvml(FakeNvml("off_the_bus"))) == Topology((1,), {})
