"""The workers of one pool as Ray sees them: placed by placement groups, named, restarted for ever."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from barista.errors import BaristaError, ConfigError
from experts.cluster.host import elsewhere
from experts.cluster.local import WORKER_RESOURCE
from experts.cluster.messages import PoolConfig
from experts.cluster.worker_actor import WorkerActor
from experts.controller.runner import Location

log = logging.getLogger(__name__)

CPUS = 0.01  # a bundle must ask for some; threads are set explicitly
PLACE_SECONDS = 10.0
LOCATE_RETRY_SECONDS = 0.2
DOMAIN_LABELS = ("ray.io/availability-zone", "topology.kubernetes.io/zone")


class RayWorkers:
    """experts.controller.runner.Workers, as actors named worker-0, worker-1, ... of the namespace.

    home: the address of the node where the pool is made, and of its engines.
    """

    def __init__(self, config: PoolConfig, token: str, namespace: str, home: str) -> None:
        self._config = config
        self._token = token
        self._namespace = namespace
        self._home = home
        self._node_ids: dict[str, str] = {}  # where each has served
        # A group is named after all of its workers, and @something if the worker has moved there.
        self._group_prefix = f"{namespace}/"

    def found(self) -> list[str]:
        """Workers that an earlier controller of this pool has made."""
        actors = ray.util.list_named_actors(all_namespaces=True)
        ours = [actor["name"] for actor in actors if actor["namespace"] == self._namespace]
        return [name for name in ours if name.startswith("worker-")]

    async def start(self, names: list[str]) -> None:
        """Place and make these actors. Raises ConfigError when they cannot be placed within 10 s."""
        await asyncio.to_thread(self._start, names)

    async def locate(self, name: str, capacity_bytes: int) -> Location:
        """Where the worker serves, as soon as it does. Raises BaristaError when it cannot."""
        while True:
            try:
                actor: Any = await asyncio.to_thread(ray.get_actor, name, self._namespace)
                address, node_id = await actor.serve.remote(capacity_bytes, self._node_ids.get(name, ""))
                self._node_ids[name] = node_id
                return Location(address, short(node_id), await asyncio.to_thread(_domain, node_id))
            except BaristaError as error:
                raise cause_of(error) from None
            except (RayActorError, ValueError):  # it is being restarted, or not made yet
                await asyncio.sleep(LOCATE_RETRY_SECONDS)
            except RayError as error:
                raise BaristaError(f"{name} cannot serve: {error}") from error

    async def restart(self, name: str) -> None:
        """Kill the worker's process, in whatever state it is; Ray makes another one in its place."""
        await asyncio.to_thread(self._kill, name, no_restart=False)

    async def move(self, name: str) -> None:
        """Make the worker anew in a place that is free; where there is none, restart it in its own.

        The place that it leaves stays taken while the pool has workers of its group, so that Ray gives the hardware to
        nobody else.
        """
        await asyncio.to_thread(self._move, name)

    async def stop(self, name: str) -> None:
        """Kill the actor for good, and free its place once no other worker shares its group."""
        await asyncio.to_thread(self._stop, name)

    def stop_all(self) -> None:
        """Kill every worker of the pool."""
        for name in self.found():
            self._stop(name)

    def _start(self, names: list[str]) -> None:
        group = self._place(names, _bundle(len(names)))
        for index, name in enumerate(names):
            self._make(name, group, index)

    def _place(self, names: list[str], bundle: dict[str, float], suffix: str = "") -> PlacementGroup:
        """A place for each. suffix: of the group's name. Raises ConfigError when there are not enough within 10 s."""
        room = _room(bundle)
        group_name = self._group_prefix + ",".join(names) + suffix
        group: PlacementGroup = placement_group(
            [bundle] * len(names), strategy="SPREAD", name=group_name, lifetime="detached"
        )
        try:
            ray.get(group.ready(), timeout=PLACE_SECONDS)
            self._require_encryption(_nodes_of(group))
        except GetTimeoutError:
            remove_placement_group(group)
            raise _cannot_place(len(names), min(room, len(names)), bundle) from None
        except ConfigError:
            remove_placement_group(group)
            raise
        return group

    def _move(self, name: str) -> None:
        try:
            group = self._place([name], _bundle(1), suffix=f"@{uuid.uuid4().hex}")
        except ConfigError as error:
            log.warning("%s is restarted where it is: %s", name, error)
            self._kill(name, no_restart=False)
            return
        self._kill(name, no_restart=True)
        deadline = time.monotonic() + PLACE_SECONDS
        while True:
            try:
                self._make(name, group, 0)
                return
            except ValueError:  # its predecessor still has the name
                if time.monotonic() > deadline:
                    raise
                time.sleep(LOCATE_RETRY_SECONDS)

    def _make(self, name: str, group: PlacementGroup, index: int) -> None:
        gpus = group.bundle_specs[index].get("GPU", 0)
        ray.remote(WorkerActor).options(
            name=name,
            namespace=self._namespace,
            lifetime="detached",
            max_restarts=-1,
            num_cpus=CPUS,
            num_gpus=gpus,
            resources={WORKER_RESOURCE: 1},
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, index),
            runtime_env=package_env(),
        ).remote(self._config, self._token, name, self._home)

    def _require_encryption(self, nodes: list[str]) -> None:
        """Raises ConfigError where workers on other hosts would do without."""
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        others = sorted({addresses[node] for node in nodes} - {self._home})
        if others and self._config.tls_dir is None:
            raise elsewhere(others)

    def _kill(self, name: str, *, no_restart: bool) -> None:
        with contextlib.suppress(ValueError):  # it is not there
            ray.kill(ray.get_actor(name, self._namespace), no_restart=no_restart)

    def _stop(self, name: str) -> None:
        self._kill(name, no_restart=True)
        self._node_ids.pop(name, None)
        left = set(self.found()) - {name}
        for table in placement_group_table().values():
            group_name = table["name"]
            if group_name.startswith(self._group_prefix) and table["state"] != "REMOVED":
                members = group_name.removeprefix(self._group_prefix).partition("@")[0].split(",")
                if left.isdisjoint(members):
                    with contextlib.suppress(ValueError):
                        remove_placement_group(get_placement_group(group_name))


def short(node_id: str) -> str:
    """A node's id as the pool's state has it."""
    return node_id[:12]


def package_env() -> dict[str, Any]:
    """What lets a process on any node import this package without an upload: the path of a checkout, if it is one."""
    root = str(Path(__file__).resolve().parents[2])
    if any(root.startswith(prefix) for prefix in (sys.prefix, sys.base_prefix)):
        return {}
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}}


def cause_of(error: BaristaError) -> BaristaError:
    """What an actor raised, without the traceback that Ray wraps it in."""
    cause = getattr(error, "cause", error)
    return cause if isinstance(cause, BaristaError) else error


def _nodes_of(group: PlacementGroup) -> list[str]:
    """The node of each bundle."""
    nodes = placement_group_table(group)["bundles_to_node_id"]
    return [nodes[index] for index in sorted(nodes)]


def _bundle(count: int) -> dict[str, float]:
    """What each of so many workers asks for: a GPU, if there are enough."""
    has_gpus = ray.cluster_resources().get("GPU", 0) >= count
    return {"CPU": CPUS, WORKER_RESOURCE: 1.0} | ({"GPU": 1.0} if has_gpus else {})


def _room(bundle: dict[str, float]) -> int:
    """How many such bundles the cluster has free resources for, nodes aside."""
    free: dict[str, float] = ray.available_resources()
    return math.floor(min(free.get(resource, 0.0) / amount for resource, amount in bundle.items()))


def _cannot_place(wanted: int, possible: int, bundle: dict[str, float]) -> ConfigError:
    needs = ", ".join(f"{amount:g} {resource}" for resource, amount in bundle.items())
    return ConfigError(
        f"Only {possible} of {wanted} workers can be placed: each needs {needs} on one node of the Ray cluster.",
        f"Ask for {possible} workers, or offer more places where nodes are started: "
        f"ray start --resources='{{\"{WORKER_RESOURCE}\": {wanted}}}'.",
    )


def _domain(node_id: str) -> str:
    labels: dict[str, str] = next((node["Labels"] for node in ray.nodes() if node["NodeID"] == node_id), {})
    return next((labels[label] for label in DOMAIN_LABELS if label in labels), "")
