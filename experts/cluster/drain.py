"""python -m experts.cluster.drain SECONDS: move all work off this Ray node before it goes, as a pod's preStop does.

First the workers, through their pool's controller, so that nothing is lost; then the engine, which finishes or hands
over what it has open. Prints what it does, and exits with 1 if something could not be moved in time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import ray
from ray.exceptions import RayError

from barista.trust import Trust
from barista.v1 import controller_pb2 as pb
from barista.v1.controller_pb2_grpc import ControllerStub
from experts.cluster.controller_actor import NAME
from experts.cluster.engines import drain_engine, engine_on

NODE_CHARACTERS = 12  # of a node's id in the pool's state
ANSWER_SECONDS = 10.0


def drain_node(seconds: float) -> bool:
    """True if nothing is left here. Call it in a process that has joined the cluster on this node."""
    node_id = ray.get_runtime_context().get_node_id()
    all_moved = True
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"] == NAME:
            all_moved &= _drain_workers(actor["namespace"], node_id[:NODE_CHARACTERS], seconds)
    for namespace in {actor["namespace"] for actor in ray.util.list_named_actors(all_namespaces=True)}:
        name = engine_on(namespace, node_id)
        if name is not None:
            print(f"draining {name}", flush=True)  # noqa: T201
            drain_engine(namespace, name)
    return all_moved


def _drain_workers(namespace: str, node: str, seconds: float) -> bool:
    controller: Any = ray.get_actor(NAME, namespace)
    (address, token, _, _), tls_dir = ray.get(
        [controller.about.remote(), controller.tls_dir.remote()], timeout=ANSWER_SECONDS
    )
    trust = Trust(token, None if tls_dir is None else Path(tls_dir))
    all_moved = True
    with trust.channel(address) as channel:
        stub = ControllerStub(channel)
        state = stub.GetState(pb.GetStateRequest(), timeout=ANSWER_SECONDS, metadata=trust.metadata)
        for worker in state.workers:
            if worker.node == node:
                print(f"draining {worker.name}", flush=True)  # noqa: T201
                request = pb.DrainWorkerRequest(worker=worker.name)
                try:
                    stub.Drain(request, timeout=seconds, metadata=trust.metadata)
                except grpc.RpcError as error:
                    print(f"{worker.name} is not drained: {error.details()}", file=sys.stderr)  # noqa: T201
                    all_moved = False
    return all_moved


def main() -> int:
    """The exit status."""
    seconds = float(sys.argv[1])
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR, namespace="barista-drain")
    except (ConnectionError, RuntimeError) as error:
        print(f"no Ray node runs here: {error}", file=sys.stderr)  # noqa: T201
        return 1
    with contextlib.suppress(RayError, grpc.RpcError):
        return 0 if drain_node(seconds) else 1
    return 1


if __name__ == "__main__":
    sys.exit(main())
