"""What Kubernetes knows of a node, as labels of the Ray node that runs on it: GPUs, zone, machine."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from barista.errors import ConfigError
from router.kubernetes.cluster import Cluster, ClusterError

# Under its own name in Ray, and under Ray's name where it has one for the same thing.
RAY_NAMES = {
    "topology.kubernetes.io/zone": "ray.io/availability-zone",
    "topology.kubernetes.io/region": "ray.io/region",
    "nvidia.com/gpu.clique": "ray.io/gpu-domain",
    "nvidia.com/gpu.product": "",
    "nvidia.com/gpu.count": "",
    "nvidia.com/gpu.memory": "",
    "node.kubernetes.io/instance-type": "",
    "kubernetes.io/hostname": "",
}
_VALUE = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?")

log = logging.getLogger(__name__)


def ray_labels(node: Mapping[str, str]) -> dict[str, str]:
    """The Ray labels of a node with these Kubernetes labels. A value that Ray would refuse is left out."""
    found = {}
    for name, ray_name in RAY_NAMES.items():
        value = node.get(name, "")
        if _VALUE.fullmatch(value):
            found[name] = value
            if ray_name:
                found[ray_name] = value
    return found


async def read_node_labels(node: str) -> dict[str, str]:
    """The Ray labels of a node of the cluster.

    Empty, with a line in the log, where it has none or the API server does not tell: a pod starts without them, too.
    """
    try:
        cluster = await Cluster.connect()
    except ConfigError as error:
        log.warning("Node labels are not known: %s", error)
        return {}
    try:
        labels = (await cluster.get(f"/api/v1/nodes/{node}"))["metadata"].get("labels") or {}
    except ClusterError as error:
        hint = " The pod's ServiceAccount needs a ClusterRole with get on nodes." if error.status in (401, 403) else ""
        log.warning("The labels of node %s cannot be read: %s.%s", node, error, hint)
        return {}
    finally:
        await cluster.close()
    found = ray_labels(labels)
    if not found:
        log.warning("Node %s has none of the labels that placement uses, such as topology.kubernetes.io/zone.", node)
    return found
