"""How a layer's (token, expert) pairs travel step by step: each worker's share out, cut to what its wire takes, and the
answers in.

A late duplicate has a name (step, layer, attempt) by which it is dropped.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from experts import kernels
from experts.express import Share
from experts.layer import Flight, Layer, Placed
from experts.link import LinkDown, RowsReply, RowsRequest, RowsStatus
from experts.liveness import STRAGGLER_FLOOR, HedgeBudget, work_of
from experts.roster import Member, Roster, Routing


@dataclass(slots=True)
class GroupCounters:
    """Since the start; layers, and the seconds spent in dispatch and in combine. The others as in PoolStats."""

    layers: int = 0
    dispatch_seconds: float = 0.0
    combine_seconds: float = 0.0
    resends: int = 0
    hedges: int = 0
    stale_epochs: int = 0
    nonfinite_rows: int = 0


class Flights:
    """Sends and receives for a worker group. budget: of hedges, which grows with what is sent."""

    def __init__(self, roster: Roster, counters: GroupCounters, clock: Callable[[], float]) -> None:
        self._roster = roster
        self._counters = counters
        self._clock = clock
        self.budget = HedgeBudget()

    def send_to_owners(self, layer: Layer, topk_ids: np.ndarray, owner: np.ndarray, routing: Routing) -> int:
        """Each owner its pairs; returns their number."""
        owners = owner.tolist()
        total = 0
        for index in sorted(set(owners)):
            if index < 0:
                continue
            member = routing.members[index]
            tokens, ids, num_pairs = kernels.split(topk_ids, owner, index)
            work = work_of(owners.count(index), num_pairs)
            self._launch(layer, member, tokens, ids, num_pairs, work, routing.epoch)
            total += num_pairs
        return total

    def take_late_answers(self) -> None:
        """Answers that nobody waited for any more: their workers can be used again."""
        for member in self._roster.members:
            link = member.link
            try:
                while link is not None and link.outstanding and link.receive(0.0) is not None:
                    pass
            except LinkDown:
                self._roster.lost(member)

    def receive(self, layer: Layer, flight: Flight, deadline: float) -> None:
        """Take answers of the flight's wire until the flight is done or the deadline passes."""
        link = flight.link
        while not flight.done:
            if flight.unsent and not self._pump(layer, flight):
                return
            try:
                reply = link.receive(0.0)  # it may be what an earlier layer did not wait for
                if reply is None:
                    reply = link.receive(deadline)
                    flight.looked = self._clock()
            except LinkDown:
                self._drop(layer, flight, lost=True)
                return
            if reply is None:
                return
            self._accept(layer, flight.member, reply)

    def count(self, member: Member, num_pairs: int) -> None:
        """A request was sent."""
        member.requests += 1
        member.rows += num_pairs
        self.budget.dispatched()

    def answered(self, member: Member, now: float, seconds: float, work: int, at_least: float) -> None:
        """An answer was found `seconds` after its request. It was not there after at_least."""
        member.exchange_seconds += seconds
        others = self._median_of_others(member) if seconds > STRAGGLER_FLOOR else 0.0
        member.liveness.answered(now, seconds, work, others, at_least)

    def take_over(self, layer: Layer) -> None:
        """What the express way has sent, as flights that are on their way."""
        assert layer.sent is not None
        layer.flights = [self._flight_of(layer, share) for share in layer.sent.shares]
        layer.recount()

    def _flight_of(self, layer: Layer, share: Share) -> Flight:
        assert layer.sent is not None
        batch, sent = layer.batch, layer.sent
        tokens, ids, num_pairs = kernels.split(layer.topk_ids, sent.owner, share.member.index)
        request = RowsRequest(
            batch.step, batch.layer, 0, sent.routing.epoch, batch.hidden_states, tokens, ids, num_pairs
        )
        return Flight(share.member, share.link, deque(), deque([request]), share.work, sent.started, sent.started)

    def _launch(
        self, layer: Layer, member: Member, tokens: np.ndarray, ids: np.ndarray, num_pairs: int, work: int, epoch: int
    ) -> None:
        """One worker's share, cut to what its wire takes at once."""
        link = member.link
        if link is None:
            return
        batch = layer.batch
        parts: deque[RowsRequest] = deque()
        for first in range(0, len(tokens), link.max_rows):
            part = slice(first, first + link.max_rows)
            pairs = num_pairs if len(tokens) <= link.max_rows else int(np.count_nonzero(ids[part] >= 0))
            parts.append(
                RowsRequest(
                    batch.step, batch.layer, layer.attempt, epoch, batch.hidden_states, tokens[part], ids[part], pairs
                )
            )
        now = self._clock()
        flight = Flight(member, link, parts, work=work, started=now, looked=now)
        layer.flights.append(flight)
        self.count(member, num_pairs)
        self._pump(layer, flight)

    def _pump(self, layer: Layer, flight: Flight) -> bool:
        """Send as much of the flight as its wire has room for. False if the wire is gone, and the flight with it."""
        member, link = flight.member, flight.link
        while flight.unsent and link.outstanding < link.depth:
            if link.depth == 1:
                self._detach(layer, member)
            try:
                link.send(flight.unsent[0])
            except LinkDown:
                self._drop(layer, flight, lost=True)
                return False
            flight.sent.append(flight.unsent.popleft())
        return True

    def _detach(self, layer: Layer, member: Member) -> None:
        """Copy the rows that lie in the member's window, because the next request may overwrite them."""
        for placed in layer.placed:
            if placed.member is not member or placed.detached:
                continue
            reply = placed.reply
            size = placed.request.num_pairs * layer.row_bytes
            copy = torch.empty(size, dtype=torch.uint8)
            ctypes.memmove(copy.data_ptr(), reply.address, size)
            inside = (layer.addresses >= reply.address) & (layer.addresses < reply.address + size)
            layer.addresses[inside] += copy.data_ptr() - reply.address
            placed.reply = replace(reply, address=copy.data_ptr(), owner=copy)
            placed.detached = True

    def _accept(self, layer: Layer, member: Member, reply: RowsReply) -> None:
        """Take in an answer to one of the layer's requests. Any other is a late duplicate."""
        name = (reply.step, reply.layer, reply.attempt)
        for flight in layer.flights:
            if flight.member is member and flight.sent:
                request = flight.sent[0]
                if name == (request.step, request.layer, request.attempt):
                    self._settle(layer, flight, reply)
                    return

    def _settle(self, layer: Layer, flight: Flight, reply: RowsReply) -> None:
        member, request = flight.member, flight.sent[0]
        flight.sent.popleft()
        if reply.epoch > request.epoch:
            self._counters.stale_epochs += 1
        if reply.status is RowsStatus.OK:
            now = self._clock()
            if flight.done:
                self.answered(member, now, now - flight.started, flight.work, flight.looked - flight.started)
            member.compute_seconds += reply.compute_seconds
            placed = kernels.place_rows(
                layer.addresses, request.tokens, request.topk_ids, reply.address, layer.row_bytes
            )
            layer.placed.append(Placed(member, request, reply))
            if layer.attempt == 0:
                layer.missing -= placed
            else:  # a hedge and what it doubles may both have come
                layer.recount()
            return
        if reply.status is RowsStatus.NOT_HELD:
            self._roster.denied(member, [(request.layer, expert) for expert in reply.not_held])
        else:
            member.liveness.quarantine(self._clock())
            layer.excluded.update((member.index, int(expert)) for expert in np.unique(request.topk_ids) if expert >= 0)
        self._drop(layer, flight, lost=False)

    def _drop(self, layer: Layer, flight: Flight, *, lost: bool) -> None:
        """Nothing more comes of this flight; its pairs are missing again, and carried by nobody."""
        if flight in layer.flights:
            layer.flights.remove(flight)
        flight.sent.clear()
        flight.unsent.clear()
        if lost:
            self._roster.lost(flight.member)

    def _median_of_others(self, member: Member) -> float:
        medians = sorted(m.liveness.median for m in self._roster.members if m is not member and m.liveness.median > 0)
        return medians[len(medians) // 2] if medians else 0.0
