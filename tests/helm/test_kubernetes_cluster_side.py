"""Readiness gates, Events and scaling against an API server, with what goes wrong there."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager

import pytest

from router.kubernetes import cluster_side, scaling
from router.kubernetes.cluster import Cluster
from router.kubernetes.cluster_side import ClusterSide
from router.kubernetes.pods import GATE, Owner, worker_pods
from router.kubernetes.scaling import read_replicas, write_replicas
from tests.helm.pools import LOADING, LOST, READY, pool, stateful_set, worker

SOON = 5.0


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(cluster_side, "LIST_SECONDS", 0.02)
    monkeypatch.setattr(cluster_side, "FIRST_RETRY_SECONDS", 0.05)


@asynccontextmanager
async def side_of(name="demo", **options):
    side = ClusterSide("default", name, **options)
    try:
        yield side
    finally:
        await side.aclose()


@asynccontextmanager
async def connected():
    cluster = await Cluster.connect()
    try:
        yield cluster
    finally:
        await cluster.close()


async def observing(side, state, until, waiting=None):
    """Observe the state, as often as the deployer would, until this holds."""
    async with asyncio.timeout(SOON):
        while not until():
            await side.observe(state, waiting)
            await asyncio.sleep(0.01)


def workers_of(api, *states, name="demo-worker"):
    """One worker in each pod, by the pods' numbers."""
    hosts = [api.get("Pod", f"{name}-{number}")["status"]["podIP"] for number in range(len(states))]
    return [worker(number, state, f"{hosts[number]}:4000") for number, state in enumerate(states)]


def gates(api, name="demo-worker"):
    """The condition of each pod, None where it has none."""
    found = {}
    for pod in api.all("Pod"):
        conditions = {one["type"]: one for one in pod["status"]["conditions"]}
        if pod["metadata"]["name"].startswith(name):
            found[pod["metadata"]["name"][-1]] = conditions.get(GATE, {}).get("status")
    return found


def patches(api):
    return [request for request in api.requests if request.verb == "patch"]


def test_gates_follow_the_pool_and_are_written_only_when_they_change(api):
    async def observes():
        api.put(stateful_set(2))
        async with side_of() as side:
            loading = pool(*workers_of(api, READY, LOADING))
            await observing(side, loading, lambda: gates(api) == {"0": "True", "1": "False"})
            lists = len(api.requests)
            await observing(side, loading, lambda: len(api.requests) > lists + 5)
            assert len(patches(api)) == 2
            await observing(
                side, pool(*workers_of(api, READY, READY)), lambda: gates(api) == {"0": "True", "1": "True"}
            )
            assert len(patches(api)) == 3
            other = {one["type"]: one["status"] for one in api.get("Pod", "demo-worker-0")["status"]["conditions"]}
            assert other["ContainersReady"] == "True"

    asyncio.run(observes())


def test_pods_without_the_gate_and_of_other_releases_are_left_alone(api):
    async def observes():
        api.put(stateful_set(1, gated=False))
        api.put(stateful_set(1, name="other-worker"))
        async with side_of() as side:
            state = pool(*workers_of(api, READY))
            await observing(side, state, lambda: len(api.requests) > 3)
            assert not patches(api)

    asyncio.run(observes())


def test_a_new_pod_of_the_same_name_is_not_told_what_was_meant_for_the_old(api):
    """The pod is replaced between the read and the patch: the uid no longer fits; the next look sees the new one."""

    def replace_pod():
        old = api.get("Pod", "demo-worker-0")
        api.delete("Pod", "demo-worker-0")
        api.put({"apiVersion": "v1", "kind": "Pod", "metadata": fresh(old), "spec": old["spec"]})

    def fresh(old):
        return {key: old["metadata"][key] for key in ("name", "labels", "annotations", "ownerReferences")}

    async def observes():
        api.put(stateful_set(1))
        api.before_next_patch(replace_pod)
        async with side_of() as side:
            await observing(side, pool(*workers_of(api, READY)), lambda: gates(api) == {"0": "False"})

    asyncio.run(observes())
    written = [
        condition["status"]
        for change in api.store.history
        if change.resource.kind == "Pod" and change.after is not None
        for condition in change.after.get("status", {}).get("conditions", [])
        if condition["type"] == GATE
    ]
    assert set(written) == {"False"}


def test_a_conflict_on_a_patch_is_made_good_without_a_word(api, caplog):
    async def observes():
        api.put(stateful_set(1))
        api.fail_next(409, lambda request: request.verb == "patch")
        async with side_of() as side:
            await observing(side, pool(*workers_of(api, READY)), lambda: gates(api) == {"0": "True"})

    asyncio.run(observes())
    assert "cannot" not in caplog.text


def test_what_is_denied_is_logged_once_and_keeps_nothing_else_from_being_done(api, caplog):
    async def observes():
        api.put(stateful_set(1))
        api.deny(lambda request: request.resource == "events")
        async with side_of() as side:
            up, down = (pool(*workers_of(api, state)) for state in (READY, LOST))
            await observing(side, up, lambda: gates(api) == {"0": "True"})
            refused = [request for request in api.requests if request.resource == "events"]
            assert not refused
            await observing(side, down, lambda: gates(api) == {"0": "False"})
            turns = iter(range(50))
            await observing(side, down, lambda: next(turns, None) is None)
            assert 2 <= sum(request.resource == "events" for request in api.requests) <= 5, (
                "each pause is twice as long"
            )
            assert caplog.text.count("cannot create events") == 1
            assert "Role" in caplog.text
            api.deny(lambda request: False)
            await observing(side, down, lambda: len(api.all("Event")) == 1)

    with caplog.at_level(logging.WARNING):
        asyncio.run(observes())


def test_it_goes_on_after_the_api_server_has_been_away(api, caplog):
    async def observes():
        api.put(stateful_set(1))
        async with side_of() as side:
            up, down = (pool(*workers_of(api, state)) for state in (READY, LOST))
            await observing(side, up, lambda: gates(api) == {"0": "True"})
            await asyncio.to_thread(api.stop)
            await observing(side, down, lambda: "cannot list pods" in caplog.text)
            await asyncio.to_thread(api.start)
            await observing(side, down, lambda: gates(api) == {"0": "False"})
            await observing(side, down, lambda: len(api.all("Event")) == 1)

    asyncio.run(observes())


def test_a_mistake_in_the_background_is_raised_to_whoever_observes(api, monkeypatch):
    async def mistake(*_):
        raise KeyError("metadata")

    monkeypatch.setattr(cluster_side, "worker_pods", mistake)

    async def observes():
        async with side_of() as side:
            await observing(side, pool(worker(0)), lambda: False)

    with pytest.raises(KeyError, match="metadata"):
        asyncio.run(observes())


def test_observing_never_waits_for_the_api_server(api):
    async def observes():
        api.put(stateful_set(1))
        state = pool(*workers_of(api, READY))
        await asyncio.to_thread(api.stop)
        async with side_of() as side:
            await side.observe(state)
            async with asyncio.timeout(0.5):
                for _ in range(50):
                    await side.observe(state)
        await asyncio.to_thread(api.start)

    asyncio.run(observes())


def test_events_are_about_the_pod_or_about_what_makes_the_pods(api):
    async def observes():
        api.put(stateful_set(2))
        async with side_of() as side:
            up = workers_of(api, READY, READY)
            await observing(side, pool(*up), lambda: gates(api) == {"0": "True", "1": "True"})
            down = pool(*workers_of(api, READY, LOST), uncovered=3)
            await observing(side, down, lambda: len(api.all("Event")) == 2)

    asyncio.run(observes())
    about = {event["reason"]: event for event in api.all("Event")}
    pod, owner = (about[reason]["regarding"] for reason in ("WorkerLost", "ExpertsUncovered"))
    assert (pod["kind"], pod["name"], pod["uid"]) == ("Pod", "demo-worker-1", uid(api, "Pod", "demo-worker-1"))
    made_by = (owner["kind"], owner["name"], owner["uid"])
    assert made_by == ("StatefulSet", "demo-worker", uid(api, "StatefulSet", "demo-worker"))
    for event in about.values():
        assert event["type"] == "Warning"
        assert event["apiVersion"] == "events.k8s.io/v1"
        assert {"eventTime", "reportingController", "reportingInstance", "action"} <= event.keys()


def uid(api, kind, name):
    return api.get(kind, name)["metadata"]["uid"]


def test_a_queue_adds_a_whole_group_of_pods(api, monkeypatch):
    monkeypatch.setattr(cluster_side, "Limits", lambda **pods: scaling.Limits(**pods, up_seconds=0.1))

    async def observes():
        api.put(stateful_set(2))
        async with side_of(groups=(2, 2, 4)) as side:
            await observing(side, pool(*workers_of(api, READY, READY)), lambda: replicas(api) == 4, waiting=20)
            await observing(side, pool(*workers_of(api, READY, READY)), lambda: side.workers_wanted == 4, waiting=20)
            await observing(side, pool(), lambda: "PodsScaled" in {event["reason"] for event in api.all("Event")})

    asyncio.run(observes())


def test_groups_are_given_in_workers_and_scaled_in_pods(api):
    async def observes():
        api.put(stateful_set(1, workers=8))
        async with side_of(groups=(16, 16, 64)) as side:
            await observing(side, pool(), lambda: side.workers_wanted == 16)

    asyncio.run(observes())
    assert replicas(api) == 2


def replicas(api):
    return api.get("StatefulSet", "demo-worker")["spec"]["replicas"]


def scale_by_hand(api, number):
    item = api.get("StatefulSet", "demo-worker")
    api.put(item | {"spec": item["spec"] | {"replicas": number}})


def test_scaling_gives_way_to_whoever_has_changed_the_number(api):
    async def observes():
        api.put(stateful_set(3, gated=False))
        api.before_next_patch(lambda: scale_by_hand(api, 8))
        async with side_of(groups=(2, 2, 8)) as side:
            await observing(side, pool(), lambda: side.workers_wanted == 8)

    asyncio.run(observes())
    assert replicas(api) == 8


def test_a_status_update_between_read_and_write_does_not_hinder_scaling(api):
    def touch():
        item = api.get("StatefulSet", "demo-worker")
        api.put(item | {"metadata": item["metadata"] | {"annotations": {"touched": "yes"}}})

    async def observes():
        api.put(stateful_set(3, gated=False))
        api.before_next_patch(touch)
        async with side_of(groups=(2, 2, 8)) as side:
            await observing(side, pool(), lambda: side.workers_wanted == 4)

    asyncio.run(observes())
    assert replicas(api) == 4
    assert sum(request.resource == "statefulsets/scale" and request.verb == "patch" for request in api.requests) == 2


def ray_cluster(replicas):
    groups = [{"groupName": "worker", "replicas": replicas, "minReplicas": 0}, {"groupName": "other", "replicas": 7}]
    spec = {"workerGroupSpecs": groups}
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "demo"}, "spec": spec}


def test_a_ray_cluster_is_scaled_in_its_first_group_and_nothing_else_of_it_changes(api):
    async def scales():
        before = api.put(ray_cluster(2))
        owner = Owner(api_version="ray.io/v1", kind="RayCluster", name="demo", uid=before["metadata"]["uid"])
        async with connected() as cluster:
            seen = await read_replicas(cluster, "default", owner)
            assert seen[0] == 2
            assert await write_replicas(cluster, "default", owner, 4, seen)
            assert api.get("RayCluster", "demo")["spec"] == ray_cluster(4)["spec"]
            assert not await write_replicas(cluster, "default", owner, 6, seen), "the number is no longer the one seen"
            assert api.get("RayCluster", "demo")["spec"] == ray_cluster(4)["spec"]

    asyncio.run(scales())


def test_worker_pods_of_a_ray_cluster_are_found(api):
    async def lists():
        uid = api.put(ray_cluster(1))["metadata"]["uid"]
        reference = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "name": "demo", "uid": uid}
        labels = {"app.kubernetes.io/component": "worker"}
        metadata = {"name": "demo-worker-abcde", "labels": labels, "ownerReferences": [reference]}
        api.put({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": []}})
        async with connected() as cluster:
            (pod,) = await worker_pods(cluster, "default", "demo")
        assert pod.owner == Owner(api_version="ray.io/v1", kind="RayCluster", name="demo", uid=uid)
        assert pod.address

    asyncio.run(lists())
