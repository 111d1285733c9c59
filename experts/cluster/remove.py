"""python -m experts.cluster.remove POOL: end the engines, the workers and the controller of a pool that has a name."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import ray
from ray.exceptions import RayError

from experts.cluster.controller_actor import NAME
from experts.cluster.engines import end_engine, engine_names
from experts.cluster.local import joined_cluster

SECONDS = 60.0


def remove_pool(pool: str) -> None:
    """Returns when all have ended, or if there is none. Call it in a process that has joined the cluster."""
    namespace = f"barista-{pool}"
    for name in engine_names(namespace):
        end_engine(namespace, name)
    with contextlib.suppress(ValueError):
        controller: Any = ray.get_actor(NAME, namespace)
        with contextlib.suppress(RayError):
            ray.get(controller.tear_down.remote(), timeout=SECONDS)
        ray.kill(controller, no_restart=True)


if __name__ == "__main__":
    with joined_cluster("auto", "barista-remove"):
        remove_pool(sys.argv[1])
