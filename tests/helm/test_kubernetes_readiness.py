"""When a worker pod counts as ready: its workers hold their experts."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.kubernetes.pods import GATE, parse_pods
from router.kubernetes.readiness import Verdict, patch_of, verdicts
from tests.helm.pools import DRAINED, DRAINING, LOADING, LOST, READY, REFUSED, STARTING, pod, worker

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
STATES = (STARTING, LOADING, READY, DRAINING, DRAINED, LOST, REFUSED)


def of_one(pod, *workers) -> Verdict:
    return verdicts([pod], workers)[pod.name]


@pytest.mark.parametrize(
    ("states", "verdict"),
    [
        ((), (False, "NoWorker")),
        ((READY,), (True, "ExpertsLoaded")),
        ((READY, READY), (True, "ExpertsLoaded")),
        ((READY, LOADING), (False, "Loading")),
        ((STARTING,), (False, "Starting")),
        ((READY, LOST), (False, "Lost")),
        ((READY, REFUSED), (False, "Refused")),
        ((READY, DRAINING), (False, "Draining")),
        ((LOST, DRAINED), (False, "Draining")),
    ],
)
def test_the_condition_by_the_states_of_the_pods_workers(states, verdict):
    workers = [worker(number, state, f"10.0.0.1:4000{number}") for number, state in enumerate(states)]
    assert of_one(pod(0), *workers) == verdict


def test_a_pod_waits_for_as_many_workers_as_it_has_room_for():
    two = [worker(0, READY, "10.0.0.1:1"), worker(1, READY, "10.0.0.1:2")]
    assert of_one(pod(0, workers=3), *two) == (False, "WorkersMissing")
    assert of_one(pod(0, workers=2), *two) == (True, "ExpertsLoaded")


def test_a_pod_that_has_been_ready_stays_so_when_the_pool_gets_smaller():
    assert of_one(pod(0, workers=3, loaded=True), worker(0)) == (True, "ExpertsLoaded")


def test_workers_are_told_apart_by_their_address_ipv6_too():
    six = pod(1, address="fd00::7")
    found = verdicts([pod(0), six], [worker(0), worker(1, LOADING, "[fd00::7]:40000"), worker(2, LOST, "")])
    assert found == {"demo-worker-0": (True, "ExpertsLoaded"), "demo-worker-1": (False, "Loading")}


def test_a_worker_without_an_address_is_of_no_pod():
    assert of_one(pod(0, address=""), worker(0, READY, "")) == (False, "NoWorker")


@given(
    st.lists(st.tuples(st.sampled_from(STATES), st.integers(0, 5)), max_size=12),
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from([None, False, True])), max_size=4),
)
def test_ready_means_some_worker_and_no_worker_that_is_not(workers, pods):
    placed = [worker(number, state, f"10.0.0.{place + 1}:1") for number, (state, place) in enumerate(workers)]
    known = [pod(number, workers=room, loaded=loaded) for number, (room, loaded) in enumerate(pods)]
    found = verdicts(known, placed)
    assert found.keys() == {each.name for each in known}
    for number, each in enumerate(known):
        mine = {state for state, place in workers if place == number}
        assert not found[each.name].loaded or mine == {READY}
        assert found[each.name].reason


def test_nothing_is_patched_that_is_so_already():
    verdict = Verdict(False, "Loading")
    patch = patch_of(pod(0), verdict, NOW)
    assert patch == {
        "metadata": {"uid": "uid-0"},
        "status": {
            "conditions": [
                {"type": GATE, "status": "False", "reason": "Loading", "lastTransitionTime": "2026-01-02T03:04:05Z"}
            ]
        },
    }
    assert patch_of(pod(0, loaded=False, reason="Loading"), verdict, NOW) is None


def test_another_reason_is_no_transition():
    patch = patch_of(pod(0, loaded=False, reason="NoWorker"), Verdict(False, "Loading"), NOW)
    assert "lastTransitionTime" not in patch["status"]["conditions"][0]


def listed(name="demo-worker-0", owner=("StatefulSet", "demo-worker"), **metadata):
    reference = {"apiVersion": "x/v1", "kind": owner[0], "name": owner[1], "uid": "o"}
    return {"metadata": {"name": name, "uid": "u", "ownerReferences": [reference], **metadata}, "spec": {}}


def test_pods_of_other_releases_and_pods_on_their_way_out_are_not_ours():
    ours = [listed("a"), listed("b", ("RayCluster", "demo"))]
    others = [
        listed("c", ("StatefulSet", "other-worker")),
        listed("d", ("RayCluster", "demo-worker")),
        listed("e", deletionTimestamp="2026-01-01T00:00:00Z"),
        {"metadata": {"name": "f", "uid": "u"}, "spec": {}},
    ]
    assert [pod.name for pod in parse_pods([*ours, *others], "demo")] == ["a", "b"]


@pytest.mark.parametrize(("annotation", "workers"), [("8", 8), ("", 1), ("0", 1), ("-1", 1), ("two", 1)])
def test_the_room_of_a_pod_is_one_unless_its_annotation_says_more(annotation, workers):
    (found,) = parse_pods([listed(annotations={"barista.dev/workers": annotation})], "demo")
    assert found.workers == workers
