"""The readiness gate of worker pods: a pod is ready when its workers hold their experts.

So a rolling update takes the next pod only when the one before has taken over its share again.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from typing import Any, NamedTuple

from barista.v1 import controller_pb2 as pb
from router.kubernetes.cluster import STRATEGIC_PATCH, Cluster
from router.kubernetes.pods import GATE, Pod, host_of

_LEAVING = (pb.WORKER_STATE_DRAINING, pb.WORKER_STATE_DRAINED)


class Verdict(NamedTuple):
    """What the condition of a pod should say. reason: one word, for programs."""

    loaded: bool
    reason: str


def verdicts(pods: Iterable[Pod], workers: Iterable[pb.Worker]) -> dict[str, Verdict]:
    """The condition of every pod, by its name."""
    at: dict[str, list[pb.Worker]] = {}
    for worker in workers:
        at.setdefault(host_of(worker.address), []).append(worker)
    return {pod.name: _verdict(pod, at.get(pod.address, []) if pod.address else []) for pod in pods}


def patch_of(pod: Pod, verdict: Verdict, now: datetime.datetime) -> dict[str, Any] | None:
    """The change of the pod's status, or None where it says so already.

    Only our own condition is in it, so it conflicts with nobody's; the uid keeps it from a new pod of the same name.
    """
    if (pod.loaded, pod.reason) == verdict:
        return None
    condition: dict[str, str] = {"type": GATE, "status": str(verdict.loaded), "reason": verdict.reason}
    if pod.loaded != verdict.loaded:
        condition["lastTransitionTime"] = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"metadata": {"uid": pod.uid}, "status": {"conditions": [condition]}}


async def set_conditions(cluster: Cluster, namespace: str, pods: Iterable[Pod], workers: Iterable[pb.Worker]) -> int:
    """Bring the conditions of all gated pods up to date; returns how many have changed. Raises ClusterError.

    A status of 404 or 409 means that a pod has been replaced since it was read: read the pods again.
    """
    gated = [pod for pod in pods if pod.gated]
    wanted = verdicts(gated, workers)
    changed = 0
    for pod in gated:
        patch = patch_of(pod, wanted[pod.name], datetime.datetime.now(datetime.UTC))
        if patch is not None:
            await cluster.patch(f"/api/v1/namespaces/{namespace}/pods/{pod.name}/status", patch, STRATEGIC_PATCH)
            changed += 1
    return changed


def _verdict(pod: Pod, workers: list[pb.Worker]) -> Verdict:
    states = {worker.state for worker in workers}
    if not workers:
        return Verdict(False, "NoWorker")
    if not states.isdisjoint(_LEAVING):
        return Verdict(False, "Draining")
    if states != {pb.WORKER_STATE_READY}:
        worst = max(states - {pb.WORKER_STATE_READY})
        return Verdict(False, pb.WorkerState.Name(worst).removeprefix("WORKER_STATE_").capitalize())
    # A pod that has been ready stays so with fewer of them: the pool may have been scaled.
    if len(workers) < pod.workers and not pod.loaded:
        return Verdict(False, "WorkersMissing")
    return Verdict(True, "ExpertsLoaded")
