"""When no reachable worker holds an expert: survivors load it from the checkpoint while the step waits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from barista.v1 import experts_pb2 as pb
from experts.roster import ExpertKey, Member, Roster

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0


class WorkerControl(Protocol):
    """The calls that loading needs (experts.attach.WorkerClient). They raise OSError when they fail."""

    def describe(self) -> pb.DescribeReply: ...
    def assign(self, keys: Iterable[ExpertKey], *, term: int, epoch: int) -> Iterator[pb.AssignProgress]: ...


def share_out(
    keys: Sequence[ExpertKey], free: Sequence[int], expert_bytes: Callable[[int], int]
) -> list[list[ExpertKey]]:
    """Which survivor loads what: each key to the one with the most room left, in the order of the keys.

    free: bytes, by survivor. What fits nowhere is left out.
    """
    shares: list[list[ExpertKey]] = [[] for _ in free]
    room = list(free)
    for key in keys:
        size = expert_bytes(key[0])
        best = max(range(len(room)), key=lambda i: (room[i], -i), default=None)
        if best is not None and room[best] >= size:
            shares[best].append(key)
            room[best] -= size
    return shares


class OnDemandLoader:
    """connect: the control calls of a member's worker. expert_bytes: of one expert of a layer."""

    def __init__(
        self, roster: Roster, connect: Callable[[Member], WorkerControl], expert_bytes: Callable[[int], int]
    ) -> None:
        self._roster = roster
        self._connect = connect
        self._expert_bytes = expert_bytes
        self._lock = threading.Lock()
        self._running = False
        self._not_before = 0.0
        self.loads = 0

    def want(self, layer: int) -> None:
        """Some expert of this layer is needed now. Starts loading all that nobody holds, this layer first, unless that
        is under way already. Returns at once; the roster changes when something has been loaded."""
        with self._lock:
            if self._running or time.monotonic() < self._not_before:
                return
            self._running = True
        missing = self._roster.uncovered(well=True)
        layers = sorted({key[0] for key in missing})
        order = {number: (number < layer, number) for number in layers}
        keys = sorted(missing, key=lambda key: (order[key[0]], key[1]))
        threading.Thread(target=self._load, args=(keys,), name="on-demand", daemon=True).start()

    def _load(self, keys: list[ExpertKey]) -> None:
        started = self.loads
        try:
            now = time.monotonic()
            survivors = [
                member
                for member in self._roster.members
                if member.up and member.link and not member.liveness.suspect(now, member.link.outstanding)
            ]
            threads = []
            reports = [self._describe(member) for member in survivors]
            free = [max(0, report.capacity_bytes - report.held_bytes) if report else 0 for report in reports]
            for member, share in zip(survivors, share_out(keys, free, self._expert_bytes), strict=True):
                if share:
                    log.warning("%s loads %d experts that no reachable worker holds.", member.name, len(share))
                    threads.append(threading.Thread(target=self._assign, args=(member, share), daemon=True))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            with self._lock:
                self._running = False
                if self.loads == started:
                    self._not_before = time.monotonic() + RETRY_SECONDS

    def _describe(self, member: Member) -> pb.DescribeReply | None:
        try:
            return self._connect(member).describe()
        except OSError as error:
            log.warning("%s does not say what it holds: %s", member.name, error)
            return None

    def _assign(self, member: Member, keys: list[ExpertKey]) -> None:
        try:
            for progress in self._connect(member).assign(keys, term=0, epoch=self._roster.epoch):
                loaded = [(held.layer, held.expert) for held in progress.loaded]
                if loaded:
                    self._roster.loaded(member, loaded)
                    with self._lock:
                        self.loads += len(loaded)
        except OSError as error:
            log.warning("%s cannot load %d experts: %s", member.name, len(keys), error)
