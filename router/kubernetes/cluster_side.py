"""What a deployment tells its cluster, and asks of it: readiness gates, Events, worker pods in whole groups."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable

from barista.v1 import controller_pb2 as pb
from router.kubernetes.cluster import Cluster, ClusterError
from router.kubernetes.events import Diary, News, write_event
from router.kubernetes.pods import Owner, Pod, host_of, worker_pods
from router.kubernetes.readiness import set_conditions, verdicts
from router.kubernetes.scaling import Limits, Scaler, read_replicas, write_replicas

LIST_SECONDS = 5.0  # pods are listed so often, and whenever a worker's state changes
FIRST_RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 60.0
KEPT_NEWS = 50  # while the API server is away
WRITES = 3  # tries to scale, each against what has just been read

log = logging.getLogger(__name__)


class ClusterSide:
    """The release whose objects' names begin with `fullname`.

    groups: how worker pods are scaled, if they are: (group size, least, most), all in workers. What the API server
    refuses is logged once for each kind and tried again later; nothing that is observed waits for it.
    """

    def __init__(self, namespace: str, fullname: str, groups: tuple[int, int, int] | None = None) -> None:
        self._namespace = namespace
        self._fullname = fullname
        self._groups = groups
        self._cluster: Cluster | None = None
        self._task: asyncio.Task[None] | None = None
        self._newest: tuple[pb.PoolState, int | None] | None = None
        self._observed = asyncio.Event()
        self._diary = Diary()
        self._news: deque[News] = deque(maxlen=KEPT_NEWS)
        self._scaler: Scaler | None = None
        self._pods: list[Pod] = []
        self._owner: Owner | None = None
        self._listed_at = float("-inf")
        self._seen: list[tuple[str, str, int]] = []
        self._said: dict[str, str] = {}  # of each step, what was refused
        self._refused: dict[str, tuple[float, float]] = {}  # of each, until when it is left alone, how long next time
        self.workers_wanted: int | None = None
        """How many workers the pods that are asked for have room for; None without `groups`, or while not known."""

    async def observe(self, state: pb.PoolState, waiting: int | None = None) -> None:
        """The pool's newest state, and how many requests wait. Returns at once.

        Raises ConfigError where no API server is known.
        """
        if self._cluster is None:
            self._cluster = await Cluster.connect()
            self._task = asyncio.create_task(self._run(self._cluster))
        if self._task is not None and self._task.done():
            self._task.result()  # a mistake of ours: it must not pass for a cluster that has nothing to do
        self._news.extend(self._diary.read(time.monotonic(), state))
        self._newest = state, waiting
        self._observed.set()

    async def aclose(self) -> None:
        """Stop, and end the connections. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._cluster is not None:
            await self._cluster.close()
            self._cluster = None

    async def _run(self, cluster: Cluster) -> None:
        while True:
            await self._observed.wait()
            self._observed.clear()
            assert self._newest is not None
            await self._look(cluster, *self._newest)

    async def _look(self, cluster: Cluster, state: pb.PoolState, waiting: int | None) -> None:
        """Do what there is to do. What is refused keeps nothing else from being done."""
        now = time.monotonic()
        seen = [(worker.name, worker.address, worker.state) for worker in state.workers]
        due = seen != self._seen or now - self._listed_at >= LIST_SECONDS
        if due and await self._try(now, "list pods", lambda: self._list_pods(cluster, now)):
            self._seen = seen
            await self._try(now, "patch pods/status", lambda: self._set_conditions(cluster, state))
            await self._try(now, "scale the worker pods", lambda: self._scale(cluster, now, state, waiting))
        await self._try(now, "create events", lambda: self._write_news(cluster))

    async def _list_pods(self, cluster: Cluster, now: float) -> None:
        self._pods = await worker_pods(cluster, self._namespace, self._fullname)
        self._listed_at = now
        if self._pods:
            self._owner = self._pods[0].owner

    async def _set_conditions(self, cluster: Cluster, state: pb.PoolState) -> None:
        try:
            await set_conditions(cluster, self._namespace, self._pods, state.workers)
        except ClusterError as error:
            if error.status not in (404, 409):
                raise
            self._listed_at = float("-inf")  # another pod stands in its place: look again at once

    async def _scale(self, cluster: Cluster, now: float, state: pb.PoolState, waiting: int | None) -> None:
        if self._groups is None or self._owner is None:
            return
        per_pod = max((pod.workers for pod in self._pods), default=1)
        if self._scaler is None:
            group, least, most = self._groups
            pods = Limits(group=max(1, group // per_pod), least=math.ceil(least / per_pod), most=most // per_pod)
            self._scaler = Scaler(pods)
        seen = await read_replicas(cluster, self._namespace, self._owner)
        replicas = seen[0]
        loaded = verdicts(self._pods, state.workers).values()
        settled = len(self._pods) == replicas and all(verdict.loaded for verdict in loaded)
        wanted = self._scaler.decide(now, replicas, waiting, settled=settled)
        for _ in range(WRITES):
            if wanted == replicas:
                break
            if await write_replicas(cluster, self._namespace, self._owner, wanted, seen):
                why = f": {waiting} request{'s' * (waiting != 1)} waiting" if waiting is not None else ""
                note = f"Worker pods scaled from {replicas} to {wanted}{why}."
                self._news.extend(self._diary.limited(now, [News(reason="PodsScaled", note=note)]))
                break
            seen = await read_replicas(cluster, self._namespace, self._owner)
            if seen[0] != replicas:  # somebody else has decided
                wanted = replicas = seen[0]
        self.workers_wanted = wanted * per_pod

    async def _write_news(self, cluster: Cluster) -> None:
        at = {pod.address: pod for pod in self._pods if pod.address}
        while self._news:
            about = at.get(host_of(self._news[0].address)) or self._owner
            if about is None:  # no pod has been seen yet
                return
            await write_event(cluster, self._namespace, self._news[0], about)
            self._news.popleft()

    async def _try(self, now: float, what: str, step: Callable[[], Awaitable[None]]) -> bool:
        """Whether the step has been done. One that is refused is left alone for a while, twice as long each time."""
        later, pause = self._refused.get(what, (now, FIRST_RETRY_SECONDS))
        if now < later:
            return False
        try:
            await step()
        except ClusterError as error:
            if self._said.get(what) != str(error):
                hint = " The Role of the deployer's ServiceAccount does not allow it." if error.status == 403 else ""
                log.warning("Kubernetes: cannot %s in namespace %s: %s.%s", what, self._namespace, error, hint)
            self._said[what] = str(error)
            self._refused[what] = now + pause, min(2 * pause, LONGEST_RETRY_SECONDS)
            return False
        self._said.pop(what, None)
        self._refused.pop(what, None)
        return True
