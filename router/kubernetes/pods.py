"""The worker pods of one Helm release, as the API server lists them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from router.kubernetes.cluster import Cluster

SELECTOR = "app.kubernetes.io/component=worker"
GATE = "barista.dev/experts-loaded"
WORKERS = "barista.dev/workers"  # an annotation


@dataclass(frozen=True, kw_only=True)
class Owner:
    """What makes the pods: a StatefulSet or a RayCluster."""

    api_version: str
    kind: str
    name: str
    uid: str


@dataclass(frozen=True, kw_only=True)
class Pod:
    """One worker pod.

    address: its IP, empty until it has one. workers: how many it has room for. gated: whether its readiness waits for
    our condition; loaded, reason: that condition's status and reason, None and "" while it has none.
    """

    name: str
    uid: str
    address: str
    owner: Owner
    workers: int = 1
    gated: bool = True
    loaded: bool | None = None
    reason: str = ""


async def worker_pods(cluster: Cluster, namespace: str, fullname: str) -> list[Pod]:
    """The worker pods of the release whose objects' names begin with `fullname`. Raises ClusterError."""
    listed = await cluster.get(f"/api/v1/namespaces/{namespace}/pods", labelSelector=SELECTOR)
    return parse_pods(listed.get("items") or [], fullname)


def parse_pods(items: Iterable[dict[str, Any]], fullname: str) -> list[Pod]:
    """Those of the release, by their owner, without the ones that are on their way out."""
    makers = {("StatefulSet", f"{fullname}-worker"), ("RayCluster", fullname)}
    found = []
    for item in items:
        metadata, status = item["metadata"], item.get("status") or {}
        owners = [one for one in metadata.get("ownerReferences") or [] if (one["kind"], one["name"]) in makers]
        if not owners or "deletionTimestamp" in metadata:
            continue
        owner = owners[0]
        condition = next((one for one in status.get("conditions") or [] if one["type"] == GATE), None)
        workers = (metadata.get("annotations") or {}).get(WORKERS, "")
        found.append(
            Pod(
                name=metadata["name"],
                uid=metadata["uid"],
                address=status.get("podIP", ""),
                owner=Owner(api_version=owner["apiVersion"], kind=owner["kind"], name=owner["name"], uid=owner["uid"]),
                workers=int(workers) if workers.isdecimal() and int(workers) > 0 else 1,
                gated=any(gate["conditionType"] == GATE for gate in item["spec"].get("readinessGates") or []),
                loaded=None if condition is None else condition["status"] == "True",
                reason="" if condition is None else condition.get("reason", ""),
            )
        )
    return found


def host_of(address: str) -> str:
    """The host of host:port, without the brackets of IPv6."""
    return address.rpartition(":")[0].strip("[]")
