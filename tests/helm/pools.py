"""Pool states and worker pods for the tests of the Kubernetes client."""

from __future__ import annotations

from barista.v1 import controller_pb2 as pb
from router.kubernetes.pods import GATE, Owner, Pod

STARTING, LOADING, READY, DRAINING, DRAINED, LOST, REFUSED = (
    getattr(pb, f"WORKER_STATE_{name}")
    for name in ("STARTING", "LOADING", "READY", "DRAINING", "DRAINED", "LOST", "REFUSED")
)
OWNER = Owner(api_version="apps/v1", kind="StatefulSet", name="demo-worker", uid="owner")


def worker(number: int, state: int = READY, address: str | None = None) -> pb.Worker:
    """worker-0 at 10.0.0.1, and so on."""
    place = f"10.0.0.{number + 1}:40{number:03}" if address is None else address
    return pb.Worker(name=f"worker-{number}", address=place, state=state)


def pool(*workers: pb.Worker, epoch: int = 1, uncovered: int = 0, moves: int = 0, term: int = 1) -> pb.PoolState:
    return pb.PoolState(term=term, epoch=epoch, workers=workers, experts_uncovered=uncovered, moves=moves)


def pod(number: int, **changes) -> Pod:
    """The pod at 10.0.0.1, and so on, whose condition has never been set."""
    known = {"name": f"demo-worker-{number}", "uid": f"uid-{number}", "address": f"10.0.0.{number + 1}"}
    return Pod(owner=OWNER, **(known | changes))


def stateful_set(replicas: int, *, name: str = "demo-worker", gated: bool = True, workers: int = 1) -> dict:
    """What the API server of the tests makes worker pods from."""
    labels = {"app.kubernetes.io/component": "worker"}
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels, "annotations": {"barista.dev/workers": str(workers)}},
                "spec": {
                    "containers": [{"name": "ray", "image": "barista"}],
                    "readinessGates": [{"conditionType": GATE}] if gated else [],
                },
            },
        },
    }
