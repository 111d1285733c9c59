"""The gating router's way to its workers: one layer's (token, expert) pairs out, the weighted sums back.

Each pair goes to one replica of its expert; the rows come back per pair and are combined here, in top-k order in
float32, so that the answer does not depend on who computed what. What does not come back is asked for again, and only
that: a worker is a pure function of the weights that it holds, so a resend is always safe, and a late duplicate has a
name (step, layer, attempt) by which it is dropped.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from experts import kernels
from experts.express import Express, Share
from experts.layer import Flight, Layer, Placed
from experts.link import LinkDown, RowsReply, RowsRequest, RowsStatus
from experts.liveness import EXPERT_COST, STRAGGLER_FLOOR, HedgeBudget, Liveness, work_of
from experts.on_demand import OnDemandLoader
from experts.pool import DispatchBatch
from experts.roster import Member, Roster, Routing

UNHELD = -2  # of kernels.route: asked for, and nobody holds it
POLL_SECONDS = 0.0005
# A worker that is late for so long, and the only one with an expert, is given up: a survivor loads the expert.
HANG_SECONDS = 1.0
# How long a layer may wait for experts that nobody holds, before the rows that need them fail.
LOAD_SECONDS = 30.0
# How long it may wait for a replica that is out of reach, when those in reach have failed.
SECOND_OPINION_SECONDS = 1.0


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


class WorkerGroup:
    """An experts.pool.Transport over all workers of a pool. Used by one thread."""

    def __init__(self, roster: Roster, loader: OnDemandLoader, clock: Callable[[], float] = time.monotonic) -> None:
        self._roster = roster
        self._loader = loader
        self._clock = clock
        self._express = Express(clock)
        self._budget = HedgeBudget()
        self.counters = GroupCounters()
        self.epoch_in_use: int | None = None  # by the layer under way; read by the thread that acknowledges epochs

    def dispatch(self, batch: DispatchBatch) -> Layer:
        """Send every pair to a replica of its expert. What nobody holds stays missing, for combine to see to."""
        now = self._clock()
        self._take_late_answers()
        routing = self._roster.routing(batch.layer, now)
        self.epoch_in_use = routing.epoch
        topk_ids = batch.topk_ids.numpy()
        addresses = np.zeros(topk_ids.shape, dtype=np.int64)
        layer = Layer(batch, topk_ids, addresses, now)
        layer.sent = self._express.dispatch(layer, routing)
        if layer.sent is not None:
            for share in layer.sent.shares:
                self._count(share.member, share.num_pairs)
        else:
            owner = kernels.route(topk_ids, routing.replicas, routing.cost, EXPERT_COST)
            layer.missing = self._send_to_owners(layer, topk_ids, owner, routing)
            if UNHELD in owner:
                layer.recount()
        self.counters.layers += 1
        self.counters.dispatch_seconds += self._clock() - now
        return layer

    def combine(self, ticket: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """As Transport.combine. Pairs that nobody could compute fail their tokens."""
        now = self._clock()
        result = None if ticket.sent is None else self._express.combine(ticket, ticket.sent)
        if result is not None:
            self._note_answers(ticket)
        else:
            if ticket.sent is not None:
                self._take_over(ticket)
            result = self._combine(ticket)
        self.epoch_in_use = None
        self.counters.combine_seconds += self._clock() - now
        return result

    def _combine(self, ticket: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather and combine until all rows are finite, or nobody else can be asked."""
        batch = ticket.batch
        hidden = batch.hidden_states.shape[1]
        while True:
            self._gather(ticket)
            rows, failed = kernels.combine_rows(ticket.addresses, batch.topk_weights, hidden, batch.hidden_states.dtype)
            if not failed.any() or not self._forget_nonfinite(ticket):
                break
        if ticket.hopeless:
            lost = torch.from_numpy(ticket.absent.any(axis=1))
            failed |= lost
            rows[lost] = 0
        if ticket.accused and not failed.any():
            for member in ticket.accused:
                member.liveness.quarantine(self._clock())
        return rows, failed

    def _note_answers(self, layer: Layer) -> None:
        """What the express way has learnt of its workers."""
        assert layer.sent is not None
        for share in layer.sent.shares:
            self._answered(share.member, share.answered, share.answered - layer.sent.started, share.work)
            share.member.compute_seconds += share.compute_seconds
            if share.epoch > layer.sent.routing.epoch:
                self.counters.stale_epochs += 1

    def _take_over(self, layer: Layer) -> None:
        """What the express way has sent, as flights that are on their way."""
        assert layer.sent is not None
        sent = layer.sent
        layer.flights = [self._flight_of(layer, share) for share in sent.shares]
        layer.recount()

    def _flight_of(self, layer: Layer, share: Share) -> Flight:
        assert layer.sent is not None
        batch, sent = layer.batch, layer.sent
        tokens, ids, num_pairs = kernels.split(layer.topk_ids, sent.owner, share.member.index)
        request = RowsRequest(
            batch.step, batch.layer, 0, sent.routing.epoch, batch.hidden_states, tokens, ids, num_pairs
        )
        return Flight(share.member, share.link, deque(), deque([request]), share.work, sent.started)

    def _count(self, member: Member, num_pairs: int) -> None:
        member.requests += 1
        member.rows += num_pairs
        self._budget.dispatched()

    def _answered(self, member: Member, now: float, seconds: float, work: int) -> None:
        member.exchange_seconds += seconds
        others = self._median_of_others(member) if seconds > STRAGGLER_FLOOR else 0.0
        member.liveness.answered(now, seconds, work, others)

    def _take_late_answers(self) -> None:
        """Answers that nobody waited for any more: their workers can be used again."""
        for member in self._roster.members:
            link = member.link
            try:
                while link is not None and link.outstanding and link.receive(0.0) is not None:
                    pass
            except LinkDown:
                self._roster.lost(member)

    # ---- sending

    def _send_to_owners(self, layer: Layer, topk_ids: np.ndarray, owner: np.ndarray, routing: Routing) -> int:
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
        flight = Flight(member, link, parts, work=work, started=self._clock())
        layer.flights.append(flight)
        self._count(member, num_pairs)
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

    # ---- receiving

    def _gather(self, layer: Layer) -> None:
        """Bring in every row that can be had."""
        for flight in list(layer.flights):  # the common case: each worker answers in its time
            if not flight.done:
                self._receive(layer, flight, flight.started + flight.member.liveness.hedge_after(flight.work))
        while layer.missing:
            self._attend(layer)

    def _receive(self, layer: Layer, flight: Flight, deadline: float) -> None:
        """Take answers of the flight's wire until the flight is done or the deadline passes."""
        link = flight.link
        while not flight.done:
            if flight.unsent and not self._pump(layer, flight):
                return
            try:
                reply = link.receive(deadline)  # it may be what an earlier layer did not wait for
            except LinkDown:
                self._drop(layer, flight, lost=True)
                return
            if reply is None:
                return
            self._accept(layer, flight.member, reply)

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
            self.counters.stale_epochs += 1
        if reply.status is RowsStatus.OK:
            now = self._clock()
            if flight.done:
                self._answered(member, now, now - flight.started, flight.work)
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

    def _median_of_others(self, member: Member) -> float:
        medians = sorted(m.liveness.median for m in self._roster.members if m is not member and m.liveness.median > 0)
        return medians[len(medians) // 2] if medians else 0.0

    def _drop(self, layer: Layer, flight: Flight, *, lost: bool) -> None:
        """Nothing more comes of this flight; its pairs are missing again, and carried by nobody."""
        if flight in layer.flights:
            layer.flights.remove(flight)
        flight.sent.clear()
        flight.unsent.clear()
        if lost:
            self._roster.lost(flight.member)

    # ---- when something is late or missing

    def _attend(self, layer: Layer) -> None:
        """One look at a layer that does not come in as it should."""
        now = self._clock()
        for flight in list(layer.flights):
            if flight.done:
                layer.flights.remove(flight)
                continue
            self._judge(layer, flight, now)
        carried = np.zeros(layer.topk_ids.shape, dtype=np.bool_)
        for flight in layer.flights:
            carried |= flight.owed(carried.shape) >= 0
        orphans = np.where(carried | (layer.addresses != 0), np.int32(-1), layer.topk_ids)
        if (orphans >= 0).any():
            self._resend(layer, orphans, now)
        if now - layer.started > LOAD_SECONDS:
            layer.give_up(np.unique(layer.topk_ids[layer.absent]).tolist())
            return
        waiting = [flight for flight in layer.flights if not flight.done]
        if not waiting:
            self._roster.wait_changed(POLL_SECONDS)
        for flight in waiting:
            self._receive(layer, flight, self._clock() + POLL_SECONDS / len(waiting))

    def _judge(self, layer: Layer, flight: Flight, now: float) -> None:
        """Ask another replica for what a slow worker carries: within the hedges' budget, and in any case once late."""
        waited, liveness = now - flight.started, flight.member.liveness
        if flight.late:
            if waited > liveness.deadline(flight.work) + HANG_SECONDS:
                self._loader.want(layer.batch.layer)
                self._duplicate(layer, flight)
        elif waited > liveness.deadline(flight.work):
            flight.late = True
            liveness.quarantine(now)
            if self._duplicate(layer, flight) and not flight.hedged:
                self.counters.resends += 1
        elif not flight.hedged and waited > liveness.hedge_after(flight.work) and self._may_hedge(liveness):
            flight.hedged = True
            if self._duplicate(layer, flight):
                self.counters.hedges += 1

    def _may_hedge(self, liveness: Liveness) -> bool:
        """A worker that has just come is not counted: its deadline is long, and its hedges are few."""
        return liveness.cold or self._budget.take()

    def _duplicate(self, layer: Layer, flight: Flight) -> bool:
        """Send what this flight still owes to replicas that have not been asked. False if there are none.

        What a worker that is in time carries already is left to it.
        """
        owed = flight.owed(layer.topk_ids.shape)
        for other in layer.flights:
            if other is not flight and not other.late:
                owed[other.owed(owed.shape) >= 0] = -1
        owed[layer.addresses != 0] = -1
        return self._send_again(layer, owed, self._routing(layer, unasked=True))

    def _resend(self, layer: Layer, orphans: np.ndarray, now: float) -> None:
        """Send pairs that nobody carries. Those whose expert nobody holds are loaded, or, if they failed, fail."""
        routing = self._routing(layer)
        if self._send_again(layer, orphans, routing):
            self.counters.resends += 1
        asked = np.unique(orphans)
        nobody = {int(expert) for expert in asked if expert >= 0 and not routing.holders[expert]}
        vain = {expert for expert in nobody if self._asked_in_vain(layer, expert, now)}
        if vain:
            layer.give_up(vain)
        if nobody - vain:
            self._loader.want(layer.batch.layer)

    def _asked_in_vain(self, layer: Layer, expert: int, now: float) -> bool:
        """Whether all who hold it have failed, so that loading it again will not help. Who is away may have another
        answer, and is given a moment to come back."""
        failed = any(expert == which for _, which in layer.excluded)
        held = self._roster.routing(layer.batch.layer, now).holders[expert]
        if not failed or not held:
            return False
        return now - layer.started > SECOND_OPINION_SECONDS or not self._roster.awaited((layer.batch.layer, expert))

    def _send_again(self, layer: Layer, topk_ids: np.ndarray, routing: Routing) -> bool:
        if not (topk_ids >= 0).any():
            return False
        owner = kernels.route(topk_ids, routing.replicas, routing.cost, EXPERT_COST)
        if owner.max() < 0:
            return False
        layer.attempt += 1
        self._send_to_owners(layer, topk_ids, owner, routing)
        return True

    def _routing(self, layer: Layer, *, unasked: bool = False) -> Routing:
        """The layer's routing as of now, less who failed in it; unasked: and less who has been asked and owes."""
        routing = self._roster.routing(layer.batch.layer, self._clock())
        without = set(layer.excluded)
        if unasked:
            for flight in layer.flights:
                asked = np.unique(flight.owed(layer.topk_ids.shape)).tolist()
                without.update((flight.member.index, expert) for expert in asked if expert >= 0)
        return routing.without(without) if without else routing

    def _forget_nonfinite(self, layer: Layer) -> bool:
        """Make pairs missing whose rows are not finite although the hidden states were, where there is another
        replica. True if there are any: the layer must be gathered again."""
        hidden_states = layer.batch.hidden_states
        sane = hidden_states.isfinite().all(dim=1).numpy()
        bad = np.zeros(layer.topk_ids.shape, dtype=np.bool_)
        for placed in layer.placed:
            bad |= self._nonfinite_pairs(layer, placed) & sane[:, None]
        if not bad.any():
            return False
        holders, number = self._routing(layer).holders, layer.batch.layer
        experts = np.unique(layer.topk_ids[bad]).tolist()
        elsewhere = [expert for expert in experts if holders[expert] or self._roster.awaited((number, expert))]
        retried = bad & np.isin(layer.topk_ids, elsewhere)
        layer.addresses[retried] = 0
        layer.recount()
        return bool(retried.any())

    def _nonfinite_pairs(self, layer: Layer, placed: Placed) -> np.ndarray:
        """[num_tokens, k] bool: pairs in use whose rows of this answer are not finite. Their worker is excluded."""
        request, reply = placed.request, placed.reply
        hidden_states = layer.batch.hidden_states
        bad = np.zeros(layer.topk_ids.shape, dtype=np.bool_)
        found = kernels.find_nonfinite(reply.address, request.num_pairs, hidden_states.shape[1], hidden_states.dtype)
        if found.any():
            rows, places = np.nonzero(request.topk_ids >= 0)
            bad[request.tokens[rows[found]], places[found]] = True
            end = reply.address + request.num_pairs * layer.row_bytes
            bad &= (layer.addresses >= reply.address) & (layer.addresses < end)
        if bad.any():
            self.counters.nonfinite_rows += int(bad.sum())
            layer.accused.add(placed.member)
            layer.excluded.update((placed.member.index, int(expert)) for expert in np.unique(layer.topk_ids[bad]))
        return bad
