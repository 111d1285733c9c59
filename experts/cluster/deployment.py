"""What keeps a deployment as it was ordered: so many workers in the pool, so many engines that run this command.

Ray restarts what dies. This looks for what Ray cannot know: places that have come with new nodes, a controller that has
moved, and an order that is another one than before.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import ray
from ray.exceptions import RayError

from barista.errors import BaristaError
from barista.trust import Trust
from barista.v1 import controller_pb2 as pb
from barista.v1.controller_pb2_grpc import ControllerStub
from experts.cluster.engines import RayEngines
from experts.cluster.local import WORKER_RESOURCE
from experts.cluster.messages import PoolConfig

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 60.0  # for nodes that are still on their way
ANSWER_SECONDS = 5.0
SCALE_SECONDS = 3600.0  # every expert may have to be read from a disk
RETRY_SECONDS = 10.0
# What a pool takes from the order that made it; another order changes nothing of it.
FIXED = ("redundancy", "threads", "worker_memory", "tls_dir", "controller_port")


def next_count(now: int, wanted: int, places: int, unchanged_seconds: float) -> int:
    """How many workers the pool is to have next.

    now: that it has. places: that the cluster offers in all, and for how long it has offered so many. All that are
    wanted if there are places for them; otherwise what fits, once nothing more seems to come. Workers are only stopped
    because fewer are wanted: a place that is missing is that of a node which restarts.
    """
    if places >= wanted or now > wanted:
        return wanted
    return max(now, places) if unchanged_seconds >= PATIENCE_SECONDS else now


def unheeded(made: PoolConfig, ordered: PoolConfig) -> str:
    """What of an order the pool, which another one has made, does not follow; empty if nothing. For people."""
    differing = [name for name in FIXED if getattr(made, name) != getattr(ordered, name)]
    if not differing:
        return ""
    values = ", ".join(f"{name} {getattr(made, name)} (ordered: {getattr(ordered, name)})" for name in differing)
    return (
        f"the pool {made.pool} keeps what it was made with: {values}; barista deploy --remove, then deploy, changes it"
    )


class Deployment:
    """Call `tend` now and then; it does not wait for what takes long.

    controller: the pool's, as a Ray actor. trust: of the deployment. say: told, for people, what is being waited for.
    """

    def __init__(
        self, config: PoolConfig, namespace: str, controller: Any, trust: Trust, say: Callable[[str], object]
    ) -> None:
        self._config = config
        self._namespace = namespace
        self._controller = controller
        self._trust = trust
        self._say = say
        self._said: set[str] = set()
        self._address = ""
        self._channel: grpc.Channel | None = None
        self._engines: RayEngines | None = None
        self._places = 0
        self._places_since = time.monotonic()
        self._busy: threading.Thread | None = None

    def tend(self) -> None:
        """One look at what there is."""
        if self._busy is not None and self._busy.is_alive():
            return
        self._busy = threading.Thread(target=self._tend, daemon=True)
        self._busy.start()

    def _tend(self) -> None:
        try:
            self._find_controller()
            assert self._engines is not None
            troubles = self._engines.tend()  # first: engines read their trunk while workers read their experts
            self._tend_workers(troubles)
            self._tell(troubles)
        except grpc.RpcError as error:
            self._tell([f"the controller: {error.details() or error.code().name}"])
            time.sleep(RETRY_SECONDS)
        except (RayError, BaristaError) as error:
            self._tell([str(error)])
            time.sleep(RETRY_SECONDS)
        except Exception:
            log.exception("A look at the deployment has failed.")
            time.sleep(RETRY_SECONDS)

    def _find_controller(self) -> None:
        """It may have been restarted on another node, and serves at another address then."""
        (address, *_), made = ray.get(
            [self._controller.about.remote(), self._controller.order.remote()], timeout=ANSWER_SECONDS
        )
        if address == self._address:
            return
        if self._channel is not None:
            self._channel.close()
        self._address, self._channel = address, self._trust.channel(address)
        command = [*self._config.engine_command, "--controller", address]
        loopback = self._config.tls_dir is None
        self._engines = RayEngines(self._namespace, self._config.engines, command, loopback=loopback)
        self._say(f"controller at {address}")
        if lines := unheeded(made, self._config):
            self._say(lines)

    def _tend_workers(self, troubles: list[str]) -> None:
        assert self._channel is not None
        stub, metadata = ControllerStub(self._channel), self._trust.metadata
        places = int(ray.cluster_resources().get(WORKER_RESOURCE, 0))
        if places != self._places:
            self._places, self._places_since = places, time.monotonic()
        state: Any = stub.GetState(pb.GetStateRequest(), timeout=ANSWER_SECONDS, metadata=metadata)
        there, wanted = len(state.workers), self._config.workers
        if there < wanted and places < wanted:
            troubles.append(f"the Ray cluster offers {places} of {wanted} places for workers ({WORKER_RESOURCE})")
        count = next_count(there, wanted, places, time.monotonic() - self._places_since)
        if count and count != there:
            self._say(f"from {there} to {count} workers")
            stub.Scale(pb.ScaleRequest(workers=count), timeout=SCALE_SECONDS, metadata=metadata)

    def _tell(self, troubles: list[str]) -> None:
        """Each once, until it has gone."""
        for text in troubles:
            if text not in self._said:
                self._say(text)
        self._said = set(troubles)
