"""The workers that an engine is attached to, and which of them can be asked for which expert right now."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from experts.link import Link, LinkDown
from experts.liveness import Liveness
from experts.pool_view import PoolView, WorkerView

log = logging.getLogger(__name__)

# Between two attempts to attach; twice as long after each that failed.
FIRST_RETRY_SECONDS = 0.25
LONGEST_RETRY_SECONDS = 2.0
CHECK_SECONDS = 0.2

OUT_OF_REACH, SUSPECT, BUSY, WELL = range(4)

ExpertKey = tuple[int, int]


@dataclass(slots=True, eq=False)
class Member:
    """One worker. index: its number in routing tables, kept for as long as the engine runs.

    extra: experts that it loaded at our demand, until the controller knows. not_held: experts that it denied, until the
    next epoch. incarnation: of the process at the link's other end. retry_seconds, retry_at, complaint: how long to
    wait after an attempt to attach that failed, until when, and why it failed.
    """

    index: int
    view: WorkerView
    link: Link | None = None
    liveness: Liveness = field(default_factory=Liveness)
    extra: set[ExpertKey] = field(default_factory=set)
    not_held: set[ExpertKey] = field(default_factory=set)
    incarnation: str = ""
    attaching: bool = False
    retry_seconds: float = FIRST_RETRY_SECONDS
    retry_at: float = 0.0
    complaint: str = ""
    requests: int = 0
    rows: int = 0
    exchange_seconds: float = 0.0
    compute_seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.view.name

    @property
    def up(self) -> bool:
        """Attached, and the wire is whole."""
        link = self.link
        return link is not None and not link.down


@dataclass(frozen=True, slots=True)
class Routing:
    """Who can be asked for the experts of one layer.

    members: by index. holders: for each expert everyone in reach that has it. fitness: of each member. replicas:
    [num_experts, R] int32, -1 padded: of the holders only the fittest, so that workers that owe an answer stand in only
    where nobody else holds the expert, and suspects and failing hardware only after these. cost: [num_members] float32,
    1 / weight.
    """

    epoch: int
    members: tuple[Member, ...]
    holders: tuple[tuple[int, ...], ...]
    fitness: tuple[int, ...]
    replicas: np.ndarray
    cost: np.ndarray

    @classmethod
    def of(
        cls, epoch: int, members: tuple[Member, ...], holders: tuple[tuple[int, ...], ...], fitness: tuple[int, ...]
    ) -> Routing:
        """The routing that follows from who holds what."""
        rank = [
            fit if member.view.weight > 0 else min(fit, SUSPECT) for fit, member in zip(fitness, members, strict=True)
        ]
        fittest = [[i for i in who if rank[i] == max(rank[j] for j in who)] for who in holders]
        replicas = np.full((len(holders), max(1, *map(len, fittest))), -1, dtype=np.int32)
        for expert, indices in enumerate(fittest):
            replicas[expert, : len(indices)] = indices
        cost = [1 / member.view.weight if member.view.weight > 0 else np.inf for member in members]
        return cls(epoch, members, holders, fitness, replicas, np.array(cost or [1], dtype=np.float32))

    def can_answer(self, index: int) -> bool:
        """Whether this member is in reach, and not a suspect that owes an answer already."""
        link = self.members[index].link
        fitness = self.fitness[index]
        return fitness > SUSPECT or (fitness == SUSPECT and link is not None and not link.outstanding)

    def without(self, pairs: Iterable[tuple[int, int]]) -> Routing:
        """The same if these (member index, expert) were not there."""
        gone = set(pairs)
        holders = tuple(tuple(i for i in who if (i, expert) not in gone) for expert, who in enumerate(self.holders))
        return Routing.of(self.epoch, self.members, holders, self.fitness)


class Roster:
    """Keeps a link to every reachable worker of the newest view, in the background.

    attach: opens a link; raises LinkDown. layers: layer -> num_experts. routing, lost and denied are the engine
    thread's; update may come from any thread.
    """

    def __init__(
        self,
        attach: Callable[[WorkerView], Link],
        layers: Mapping[int, int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._attach = attach
        self._layers = dict(layers)
        self._clock = clock
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._members: dict[str, Member] = {}
        self._view: PoolView | None = None
        self.placement = 0, 0  # term and epoch in force
        self._version = 0
        self._cached: tuple[object, ...] = ()
        self._settled = -1  # the version in which nobody was suspect or owed an answer when last looked at
        self._routings: dict[int, Routing] = {}
        self._uncovered: dict[bool, tuple[tuple[int, ...], list[ExpertKey]]] = {}
        self._closed = False
        self._check = threading.Event()
        self._thread = threading.Thread(target=self._keep_attached, name="roster", daemon=True)
        self._thread.start()

    @property
    def view(self) -> PoolView | None:
        """The newest view, None before the first."""
        return self._view

    @property
    def epoch(self) -> int:
        """The placement in force."""
        return self._view.epoch if self._view else 0

    @property
    def members(self) -> tuple[Member, ...]:
        """All workers ever seen, by index; also those that are gone."""
        return tuple(self._members.values())

    def update(self, view: PoolView) -> None:
        """A view from the controller. An older one than the present is ignored."""
        with self._lock:
            if self._view is not None and (view.term, view.epoch) < (self._view.term, self._view.epoch):
                return
            newer = self._view is None or view.epoch > self._view.epoch or view.term > self._view.term
            # The others read without the lock: whoever sees the view sees its members, and asks for a new routing.
            for worker in view.workers:
                self._meet(worker)
            self._change()
            self._view = view
            self.placement = view.term, view.epoch
            if newer:
                for member in self._members.values():
                    member.not_held.clear()
        self._check.set()

    def routing(self, layer: int, now: float) -> Routing:
        """Who to ask at this moment."""
        members = self.members
        if self._version != self._settled or not all(map(_quiet, members)):
            fitness = [_fitness(member, now) for member in members]
            state = (self._version, *fitness)
            if state != self._cached:
                self._cached = state
                self._routings.clear()
            self._settled = -1 if SUSPECT in fitness or BUSY in fitness else self._version
        found = self._routings.get(layer)
        if found is None:
            found = self._routings[layer] = self._route(layer, members, now)
        return found

    def uncovered(self, *, well: bool = False) -> list[ExpertKey]:
        """Experts that no reachable worker holds, in order. well: count suspects as out of reach."""
        now = self._clock()
        members = self.members
        least = BUSY if well else SUSPECT
        state = (self._version, *[_fitness(member, now) >= least for member in members])
        found = self._uncovered.get(well)
        if found is None or found[0] != state:
            found = self._uncovered[well] = state, self._find_uncovered(members, now, least)
        return list(found[1])

    def awaited(self, key: ExpertKey) -> bool:
        """Whether a worker that holds it, by the controller's word, is out of reach and may come back."""
        view = self._view
        members = self._members  # read after the view, so that all whom it names are there
        if view is None or key[0] not in view.replicas:
            return False
        reachable = {worker.name for worker in view.workers}
        return any(name in reachable and not members[name].up for name in view.replicas[key[0]][key[1]])

    def lost(self, member: Member) -> None:
        """Its wire broke."""
        with self._lock:
            self._change()
        self._check.set()

    def denied(self, member: Member, keys: Iterable[ExpertKey]) -> None:
        """It does not hold these after all."""
        with self._lock:
            member.not_held.update(keys)
            member.extra.difference_update(keys)
            self._change()

    def loaded(self, member: Member, keys: Iterable[ExpertKey]) -> None:
        """It holds these now, whatever the placement says."""
        with self._lock:
            member.extra.update(keys)
            member.not_held.difference_update(keys)
            self._change()

    def wait_changed(self, seconds: float) -> None:
        """Return at the next change, or after `seconds`."""
        with self._changed:
            self._changed.wait(seconds)

    def close(self) -> None:
        """End every link."""
        with self._lock:
            self._closed = True
        self._check.set()
        self._thread.join()
        for member in self.members:
            if member.link is not None:
                member.link.close()

    def _meet(self, worker: WorkerView) -> None:
        member = self._members.get(worker.name)
        if member is None:
            # A new dictionary, because the engine's thread reads the old one without the lock.
            self._members = self._members | {worker.name: Member(len(self._members), worker)}
        elif member.view != worker:
            if member.view.incarnation != worker.incarnation:
                member.extra.clear()
            member.view = worker
            member.retry_seconds = FIRST_RETRY_SECONDS
            member.retry_at = 0.0

    def _change(self) -> None:
        self._version += 1
        self._changed.notify_all()

    def _route(self, layer: int, members: tuple[Member, ...], now: float) -> Routing:
        with self._lock:
            view = self._view
            fitness = tuple(_fitness(member, now) for member in members)
            by_name = {member.name: member.index for member in members}
            placed = view.replicas.get(layer, ()) if view else ()
            holders = []
            for expert in range(self._layers[layer]):
                key = (layer, expert)
                names = placed[expert] if expert < len(placed) else ()
                who = {by_name[name] for name in names if name in by_name}
                who |= {member.index for member in members if key in member.extra}
                reachable = (i for i in who if fitness[i] > OUT_OF_REACH and key not in members[i].not_held)
                holders.append(tuple(sorted(reachable)))
            return Routing.of(self.epoch, members, tuple(holders), fitness)

    def _find_uncovered(self, members: tuple[Member, ...], now: float, least: int) -> list[ExpertKey]:
        """Experts that no member of at least this fitness holds."""
        keys = []
        for layer in sorted(self._layers):
            routing = self._route(layer, members, now)
            for expert, who in enumerate(routing.holders):
                if all(routing.fitness[i] < least for i in who):
                    keys.append((layer, expert))
        return keys

    def _keep_attached(self) -> None:
        while True:
            self._check.wait(CHECK_SECONDS)
            self._check.clear()
            with self._lock:
                if self._closed:
                    return
                view = self._view
            if view is None:
                continue
            reachable = {worker.name for worker in view.workers}
            now = self._clock()
            for member in self.members:
                if member.name not in view.names and member.link is not None and not member.attaching:  # scaled away
                    link, member.link = member.link, None
                    link.close()
                # A host that vanished leaves its link up, and its worker may come back elsewhere before that shows.
                away = not member.up or member.incarnation != member.view.incarnation
                if away and member.name in reachable and not member.attaching and now >= member.retry_at:
                    member.attaching = True
                    threading.Thread(target=self._attach_one, args=(member,), daemon=True).start()

    def _attach_one(self, member: Member) -> None:
        view = member.view
        try:
            link = self._attach(view)
        except LinkDown as error:
            complaint = str(error)  # the error itself would keep the window alive for as long as its record in a log
            if complaint != member.complaint:
                log.warning("%s at %s cannot be attached: %s", view.name, view.address, complaint)
            member.complaint = complaint
            if member.view is view:
                member.retry_at = self._clock() + member.retry_seconds
                member.retry_seconds = min(2 * member.retry_seconds, LONGEST_RETRY_SECONDS)
        else:
            log.info("%s at %s is attached (%s).", view.name, view.address, link.transport)
            member.complaint, member.retry_seconds = "", FIRST_RETRY_SECONDS
            old, member.link, member.incarnation = member.link, link, view.incarnation
            if old is not None:
                old.close()
            member.liveness = Liveness()
        finally:
            member.attaching = False
        with self._lock:
            closed = self._closed
            self._change()
        if closed and member.link is not None:
            member.link.close()


def _quiet(member: Member) -> bool:
    """Whether its fitness cannot have changed but by what changes the version: the look that every layer takes."""
    link = member.link
    return (link is None or not link.outstanding) and not member.liveness.quarantined


def _fitness(member: Member, now: float) -> int:
    """Who is asked first: the well before those that owe an answer, these before suspects."""
    link = member.link
    if link is None or link.down:
        return OUT_OF_REACH
    if member.liveness.suspect(now, link.outstanding):
        return SUSPECT
    return BUSY if link.outstanding else WELL
