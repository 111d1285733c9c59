"""When no reachable worker holds an expert: survivors load it from the checkpoint while the step waits."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from barista.v1 import experts_pb2 as pb
from experts.roster import ExpertKey, Member, Roster

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
# A survivor that has not said within this time how much room it has is not asked to load anything.
DESCRIBE_SECONDS = 1.0
# A load that has not come forward for so long is left to itself, and another is begun.
STALL_SECONDS = 5.0


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
        self._attempt = 0
        self._not_before = 0.0
        self.loads = 0

    def want(self, layer: int) -> None:
        """Some expert of this layer is needed now. Starts loading all that nobody holds, this layer first, unless that
        is under way already. Returns at once; the roster changes when something has been loaded."""
        with self._lock:
            now = time.monotonic()
            if now < self._not_before:
                return
            self._not_before = now + STALL_SECONDS
            self._attempt += 1
            attempt = self._attempt
        missing = self._roster.uncovered(well=True)
        layers = sorted({key[0] for key in missing})
        order = {number: (number < layer, number) for number in layers}
        keys = sorted(missing, key=lambda key: (order[key[0]], key[1]))
        threading.Thread(target=self._load, args=(keys, attempt), name="on-demand", daemon=True).start()

    def _load(self, keys: list[ExpertKey], attempt: int) -> None:
        started = self.loads
        try:
            room = self._room()
            threads = []
            for member, share in zip(room, share_out(keys, list(room.values()), self._expert_bytes), strict=True):
                if share:
                    log.warning("%s loads %d experts that no reachable worker holds.", member.name, len(share))
                    threads.append(threading.Thread(target=self._assign, args=(member, share, attempt), daemon=True))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            self._wait_at_least(0.0 if self.loads > started else RETRY_SECONDS, attempt)

    def _wait_at_least(self, seconds: float, attempt: int) -> None:
        """When the next load may begin, as far as this one has a say in it still."""
        with self._lock:
            if attempt == self._attempt:
                self._not_before = time.monotonic() + seconds

    def _room(self) -> dict[Member, int]:
        """Survivors that are well, and the bytes that each has free."""
        now = time.monotonic()
        survivors = [member for member in self._roster.members if _well(member, now)]
        answers: queue.SimpleQueue[tuple[Member, int]] = queue.SimpleQueue()
        for member in survivors:
            threading.Thread(target=lambda m=member: answers.put((m, self._free(m))), daemon=True).start()
        free: dict[Member, int] = {}
        try:
            while len(free) < len(survivors):
                member, size = answers.get(timeout=max(0.0, now + DESCRIBE_SECONDS - time.monotonic()))
                free[member] = size
        except queue.Empty:
            silent = ", ".join(member.name for member in survivors if member not in free)
            log.warning("%s: no answer about free memory.", silent)
        return {member: free[member] for member in survivors if member in free}

    def _free(self, member: Member) -> int:
        try:
            report = self._connect(member).describe()
        except OSError as error:
            log.warning("%s does not say what it holds: %s", member.name, error)
            return 0
        return max(0, report.capacity_bytes - report.held_bytes)

    def _assign(self, member: Member, keys: list[ExpertKey], attempt: int) -> None:
        try:
            for progress in self._connect(member).assign(keys, term=0, epoch=self._roster.epoch):
                self._wait_at_least(STALL_SECONDS, attempt)
                loaded = [(held.layer, held.expert) for held in progress.loaded]
                if loaded:
                    self._roster.loaded(member, loaded)
                    with self._lock:
                        self.loads += len(loaded)
        except OSError as error:
            log.warning("%s cannot load %d experts: %s", member.name, len(keys), error)


def _well(member: Member, now: float) -> bool:
    link = member.link  # the roster may replace or drop it meanwhile
    up = link is not None and not link.down and not member.liveness.suspect(now, link.outstanding)
    return up and member.view.weight > 0
