"""python -m experts.cluster.drain SECONDS: move all work off this Ray node before it goes, as a pod's preStop does.

First the workers, through their pool's controller, so that nothing is lost; then the engine, which finishes or hands
over what it has open. Prints what it does, and exits with 1 if something could not be moved in time.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import ray
from ray.exceptions import RayError

from barista.errors import BaristaError, ConfigError
from barista.trust import Trust
from barista.v1 import controller_pb2 as pb
from barista.v1.controller_pb2_grpc import ControllerStub
from experts.cluster.controller_actor import NAME
from experts.cluster.engines import drain_engine, engine_on
from experts.cluster.local import joined_cluster
from experts.cluster.workers import short

ANSWER_SECONDS = 10.0


def drain_node(seconds: float) -> bool:
    """True if nothing is left here. Call it in a process that has joined the cluster on this node."""
    node_id: str = ray.get_runtime_context().get_node_id()
    actors = ray.util.list_named_actors(all_namespaces=True)
    all_moved = True
    for namespace in sorted(actor["namespace"] for actor in actors if actor["name"] == NAME):
        all_moved &= _drain_workers(namespace, short(node_id), seconds)
    for namespace in sorted({actor["namespace"] for actor in actors}):
        name = engine_on(namespace, node_id)
        if name is not None:
            _say(f"draining {name}")
            drain_engine(namespace, name)
    return all_moved


def _drain_workers(namespace: str, node: str, seconds: float) -> bool:
    """Whether they hold nothing any more. Whatever went wrong is said: the node goes in any case."""
    try:
        controller: Any = ray.get_actor(NAME, namespace)
        (address, token, _, _), order = ray.get(
            [controller.about.remote(), controller.order.remote()], timeout=ANSWER_SECONDS
        )
        trust = Trust(token, Path(order.tls_dir) if order.tls_dir else None)
        with trust.channel(address) as channel:
            stub = ControllerStub(channel)
            state = stub.GetState(pb.GetStateRequest(), timeout=ANSWER_SECONDS, metadata=trust.metadata)
            names = [worker.name for worker in state.workers if worker.node == node]
            if names:
                _say(f"draining {', '.join(names)}")
                stub.Drain(pb.DrainWorkerRequest(node=node), timeout=seconds, metadata=trust.metadata)
    except grpc.RpcError as error:
        _complain(f"the workers are not drained: {error.details() or error.code().name}")
        return False
    except (RayError, ValueError, BaristaError) as error:
        _complain(f"the workers are not drained: {error}")
        return False
    return True


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def _complain(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201


def main() -> int:
    """The exit status."""
    seconds = float(sys.argv[1])
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()
    try:
        with joined_cluster("auto", "barista-drain"):
            return 0 if drain_node(seconds) else 1
    except ConfigError as error:
        _complain(f"this node cannot be drained: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
