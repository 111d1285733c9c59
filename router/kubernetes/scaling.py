"""How many worker pods there should be: whole groups, more while requests wait, fewer after a long calm."""

from __future__ import annotations

import math
from dataclasses import dataclass

from router.kubernetes.cluster import JSON_PATCH, MERGE_PATCH, Cluster, ClusterError
from router.kubernetes.pods import Owner


@dataclass(frozen=True, kw_only=True)
class Limits:
    """group, least, most: pods; the bounds are rounded inwards to whole groups.

    One group more after `high` or more requests have waited all of `up_seconds`; one less after `low` or fewer have
    waited all of `down_seconds`.
    """

    group: int
    least: int
    most: int
    high: int = 8
    low: int = 0
    up_seconds: float = 30.0
    down_seconds: float = 600.0

    @property
    def fewest_groups(self) -> int:
        """At least one."""
        return max(1, math.ceil(self.least / self.group))

    @property
    def most_groups(self) -> int:
        """At least as many as the fewest."""
        return max(self.fewest_groups, self.most // self.group)


class Scaler:
    """Decides, and does nothing. Times are seconds of one monotonic clock."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._high_since: float | None = None
        self._low_since: float | None = None

    def decide(self, now: float, replicas: int, waiting: int | None, *, settled: bool) -> int:
        """How many pods there should be: always a multiple of the group, within the bounds.

        waiting: requests that wait; None: nobody knows, and then nothing is added or taken away. settled: every pod
        that is there holds its experts; what has been added must first show what it is worth.
        """
        limits = self._limits
        known = settled and waiting is not None
        high = known and waiting is not None and waiting >= limits.high
        low = known and waiting is not None and waiting <= limits.low
        self._high_since = _since(self._high_since, now, high)
        self._low_since = _since(self._low_since, now, low)
        groups = math.ceil(replicas / limits.group)
        if self._high_since is not None and now - self._high_since >= limits.up_seconds:
            groups += 1
            self._high_since = None
        elif self._low_since is not None and now - self._low_since >= limits.down_seconds:
            groups -= 1
            self._low_since = None
        return limits.group * min(max(groups, limits.fewest_groups), limits.most_groups)


async def read_replicas(cluster: Cluster, namespace: str, owner: Owner) -> tuple[int, str]:
    """How many worker pods are asked for now, and the resource version of that. Raises ClusterError."""
    item = await cluster.get(_path(namespace, owner))
    if owner.kind == "RayCluster":
        return int(item["spec"]["workerGroupSpecs"][0].get("replicas", 0)), item["metadata"]["resourceVersion"]
    return int(item["spec"].get("replicas", 0)), item["metadata"]["resourceVersion"]


async def write_replicas(cluster: Cluster, namespace: str, owner: Owner, replicas: int, seen: tuple[int, str]) -> bool:
    """Ask for so many, unless somebody has changed the number that was `seen`: then False. Raises ClusterError."""
    before, version = seen
    try:
        if owner.kind == "RayCluster":  # its list of groups merges with nothing, so one number in it is replaced
            place = "/spec/workerGroupSpecs/0/replicas"
            test = {"op": "test", "path": place, "value": before}
            replace = {"op": "replace", "path": place, "value": replicas}
            await cluster.patch(_path(namespace, owner), [test, replace], JSON_PATCH)
        else:
            scale = {"metadata": {"resourceVersion": version}, "spec": {"replicas": replicas}}
            await cluster.patch(_path(namespace, owner), scale, MERGE_PATCH)
    except ClusterError as error:
        if error.status in (409, 422):  # a version, or a test, that no longer holds
            return False
        raise
    return True


def _path(namespace: str, owner: Owner) -> str:
    if owner.kind == "RayCluster":
        return f"/apis/{owner.api_version}/namespaces/{namespace}/rayclusters/{owner.name}"
    return f"/apis/apps/v1/namespaces/{namespace}/statefulsets/{owner.name}/scale"


def _since(since: float | None, now: float, holds: bool) -> float | None:
    """Since when a condition has held."""
    if not holds:
        return None
    return now if since is None else since
