"""What keeps a deployment as it was ordered: so many workers in the pool, so many engines that run this command.

Ray restarts what dies. This looks for what Ray cannot know: places that have come with new nodes, and an order that is
another one than before.
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
STATE_SECONDS = 5.0
SCALE_SECONDS = 3600.0  # every expert may have to be read from a disk
RETRY_SECONDS = 10.0


def next_count(now: int, wanted: int, places: int, unchanged_seconds: float) -> int:
    """How many workers the pool is to have next.

    now: that it has. places: that the cluster offers in all, and for how long it has offered so many. All that are
    wanted if there are places for them; otherwise what fits, once nothing more seems to come. Workers are only stopped
    because fewer are wanted: a place that is missing is that of a node which restarts.
    """
    if places >= wanted or now > wanted:
        return wanted
    return max(now, places) if unchanged_seconds >= PATIENCE_SECONDS else now


class Deployment:
    """Call `tend` now and then; it does not wait for what takes long.

    address, token: of the pool's controller. say: told, for people, what is being waited for.
    """

    def __init__(
        self, config: PoolConfig, namespace: str, address: str, trust: Trust, say: Callable[[str], object]
    ) -> None:
        command = [*config.engine_command, "--controller", address]
        self._config = config
        self._engines = RayEngines(namespace, config.engines, command, loopback=config.tls_dir is None)
        self._channel = trust.channel(address)
        self._stub = ControllerStub(self._channel)
        self._metadata = trust.metadata
        self._say = say
        self._said = ""
        self._places = 0
        self._places_since = time.monotonic()
        self._busy: threading.Thread | None = None

    def tend(self) -> None:
        """One look at what there is."""
        if self._busy is not None and self._busy.is_alive():
            return
        places = int(ray.cluster_resources().get(WORKER_RESOURCE, 0))
        if places != self._places:
            self._places, self._places_since = places, time.monotonic()
        self._busy = threading.Thread(target=self._tend, daemon=True)
        self._busy.start()

    def _tend(self) -> None:
        try:
            self._engines.tend()  # first: engines read their trunk while workers read their experts
            self._tend_workers()
        except grpc.RpcError as error:
            self._tell(f"the controller: {error.details() or error.code().name}")
            time.sleep(RETRY_SECONDS)
        except (RayError, BaristaError) as error:
            self._tell(str(error))
            time.sleep(RETRY_SECONDS)

    def _tend_workers(self) -> None:
        state: Any = self._stub.GetState(pb.GetStateRequest(), timeout=STATE_SECONDS, metadata=self._metadata)
        there, wanted = len(state.workers), self._config.workers
        count = next_count(there, wanted, self._places, time.monotonic() - self._places_since)
        if there < wanted and self._places < wanted:
            self._tell(f"the Ray cluster offers {self._places} of {wanted} places for workers ({WORKER_RESOURCE})")
        if count and count != there:
            self._tell(f"from {there} to {count} workers")
            self._stub.Scale(pb.ScaleRequest(workers=count), timeout=SCALE_SECONDS, metadata=self._metadata)

    def _tell(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._say(text)
