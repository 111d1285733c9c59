"""What happens in a pool, as Kubernetes Events: for those who look with `kubectl describe` or `kubectl get events`.

Numbers and workers' names are told, never which expert: that would say something about prompts.
"""

from __future__ import annotations

import datetime
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from barista.v1 import controller_pb2 as pb
from router.kubernetes.cluster import Cluster
from router.kubernetes.pods import Owner, Pod

NAMED = 5  # workers named in one event
EPOCH_SECONDS = 60.0  # placement changes within it are one event
BURST = 10
REFILL_SECONDS = 15.0  # one more event may be written


@dataclass(frozen=True, kw_only=True)
class News:
    """One thing that happened. address: of the worker that it happened to, if it was one alone."""

    reason: str
    note: str
    warning: bool = False
    address: str = ""


class Diary:
    """Turns the pool's states, one after the other, into news. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._before: pb.PoolState | None = None
        self._lost: set[str] = set()
        self._told_epoch: tuple[int, int] = (0, 0)
        self._told_moves = 0
        self._told_at = float("-inf")
        self._allowed = float(BURST)
        self._allowed_at: float | None = None
        self._kept_back = 0

    def read(self, now: float, state: pb.PoolState) -> list[News]:
        """What has happened since the last state: nothing at the first. At most BURST at once, and in time few."""
        before, self._before = self._before, state
        if before is None:
            self._lost = _names(state, pb.WORKER_STATE_LOST)
            self._told_epoch, self._told_moves, self._told_at = _epoch(state), state.moves, now
            return []
        return self.limited(
            now,
            [
                *self._lost_and_found(state),
                *_refused(before, state),
                *_coverage(before, state),
                *_scaled(before, state),
                *self._placement(now, state),
            ],
        )

    def limited(self, now: float, news: list[News]) -> list[News]:
        """As many of them as may be written now; a later one says how many were not."""
        elapsed = 0.0 if self._allowed_at is None else now - self._allowed_at
        self._allowed = min(float(BURST), self._allowed + elapsed / REFILL_SECONDS)
        self._allowed_at = now
        kept = news[: int(self._allowed)]
        self._allowed -= len(kept)
        if kept and self._kept_back:
            last = kept[-1]
            more = f"{last.note} {self._kept_back} earlier events were left out."
            kept[-1] = News(reason=last.reason, note=more, warning=last.warning, address=last.address)
            self._kept_back = 0
        self._kept_back += len(news) - len(kept)
        return kept

    def _lost_and_found(self, state: pb.PoolState) -> list[News]:
        lost = _names(state, pb.WORKER_STATE_LOST)
        there = {worker.name for worker in state.workers}
        back = self._lost & _names(state, pb.WORKER_STATE_READY)
        new = lost - self._lost
        # One that loads again is not back before it is ready; one that has been stopped never will be.
        self._lost = (self._lost | lost) & there - back
        return [
            *_of_workers("WorkerLost", "lost", new, state, warning=True),
            *_of_workers("WorkerReturned", "back, with experts loaded", back, state),
        ]

    def _placement(self, now: float, state: pb.PoolState) -> list[News]:
        if _epoch(state) == self._told_epoch or now - self._told_at < EPOCH_SECONDS:
            return []
        moves = max(0, state.moves - self._told_moves)
        self._told_epoch, self._told_moves, self._told_at = _epoch(state), state.moves, now
        text = f"Placement epoch {state.epoch}: {moves} replica{'s' * (moves != 1)} loaded or released since the last."
        return [News(reason="PlacementChanged", note=text)]


async def write_event(cluster: Cluster, namespace: str, news: News, about: Pod | Owner) -> None:
    """Create the Event. Raises ClusterError."""
    now = datetime.datetime.now(datetime.UTC)
    kind, version = ("Pod", "v1") if isinstance(about, Pod) else (about.kind, about.api_version)
    event = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"generateName": f"{about.name}.", "namespace": namespace},
        "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": "barista.dev/deployer",
        "reportingInstance": socket.gethostname()[:128],
        "action": news.reason,
        "reason": news.reason,
        "regarding": {
            "apiVersion": version,
            "kind": kind,
            "namespace": namespace,
            "name": about.name,
            "uid": about.uid,
        },
        "note": news.note[:1024],
        "type": "Warning" if news.warning else "Normal",
    }
    await cluster.post(f"/apis/events.k8s.io/v1/namespaces/{namespace}/events", event)


def _names(state: pb.PoolState, *states: int) -> set[str]:
    return {worker.name for worker in state.workers if worker.state in states}


def _epoch(state: pb.PoolState) -> tuple[int, int]:
    return state.term, state.epoch


def _of_workers(
    reason: str, what: str, names: Iterable[str], state: pb.PoolState, *, warning: bool = False
) -> list[News]:
    """One piece of news, however many workers it is about."""
    about = [worker for worker in state.workers if worker.name in set(names)]
    if not about:
        return []
    listed = ", ".join(worker.name for worker in about[:NAMED])
    others = f" and {len(about) - NAMED} more" if len(about) > NAMED else ""
    note = f"{listed}{others} {'is' if len(about) == 1 else 'are'} {what}."
    address = about[0].address if len(about) == 1 else ""
    return [News(reason=reason, note=note, warning=warning, address=address)]


def _refused(before: pb.PoolState, state: pb.PoolState) -> list[News]:
    new = _names(state, pb.WORKER_STATE_REFUSED) - _names(before, pb.WORKER_STATE_REFUSED)
    return _of_workers("WorkerRefused", "refused: see `barista status`", new, state, warning=True)


def _coverage(before: pb.PoolState, state: pb.PoolState) -> list[News]:
    count = state.experts_uncovered
    if count and not before.experts_uncovered:
        text = (
            f"{count} expert{'s have' if count > 1 else ' has'} no live worker; engines load what they need meanwhile."
        )
        return [News(reason="ExpertsUncovered", note=text, warning=True)]
    if before.experts_uncovered and not count:
        return [News(reason="ExpertsCovered", note="Every expert has a live worker again.")]
    return []


def _scaled(before: pb.PoolState, state: pb.PoolState) -> list[News]:
    was, now = len(before.workers), len(state.workers)
    if was == now or not was or not now:  # a controller that has just started knows none
        return []
    return [News(reason="PoolScaled", note=f"The pool has {now} worker{'s' * (now != 1)}; it had {was}.")]
