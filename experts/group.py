"""The gating router's way to its workers: one layer's (token, expert) pairs out, the weighted sums back.

Each pair goes to one replica of its expert; the rows come back per pair and are combined here, in top-k order in
float32, so that the answer does not depend on who computed what. What does not come back is asked for again, and only
that (recovery.py): a worker is a pure function of the weights that it holds, so a resend is always safe.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from experts import kernels
from experts.express import Express
from experts.flights import Flights, GroupCounters
from experts.layer import Layer
from experts.liveness import EXPERT_COST
from experts.on_demand import OnDemandLoader
from experts.pool import DispatchBatch
from experts.recovery import Recovery
from experts.roster import Roster

UNHELD = -2  # of kernels.route: asked for, and nobody holds it


class WorkerGroup:
    """An experts.pool.Transport over all workers of a pool. Used by one thread."""

    def __init__(self, roster: Roster, loader: OnDemandLoader, clock: Callable[[], float] = time.monotonic) -> None:
        self._roster = roster
        self._clock = clock
        self.counters = GroupCounters()
        self._express = Express(clock)
        self._flights = Flights(roster, self.counters, clock)
        self._recovery = Recovery(roster, loader, self._flights, self.counters, clock)
        # Term and epoch by which the layer under way was sent, or older; read by the thread that acknowledges epochs.
        self.placement_in_use: tuple[int, int] | None = None
        self._unavailable: tuple[int, torch.Tensor] | None = None

    def dispatch(self, batch: DispatchBatch) -> Layer:
        """Send every pair to a replica of its expert. What nobody holds stays missing, for combine to see to."""
        now = self._clock()
        self._flights.take_late_answers()
        self.placement_in_use = self._roster.placement  # before the routing, which may then be newer, never older
        routing = self._roster.routing(batch.layer, now)
        topk_ids = batch.topk_ids.numpy()
        layer = Layer(batch, topk_ids, np.zeros(topk_ids.shape, dtype=np.int64), now)
        if self._recovery.given_up:
            self._recovery.forsake(layer, routing)
        layer.sent = None if layer.hopeless else self._express.dispatch(layer, routing)
        if layer.sent is not None:
            for share in layer.sent.shares:
                self._flights.count(share.member, share.num_pairs)
        else:
            wanted = layer.wanted
            owner = kernels.route(wanted, routing.replicas, routing.cost, EXPERT_COST)
            layer.missing = self._flights.send_to_owners(layer, wanted, owner, routing)
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
                self._flights.take_over(ticket)
            result = self._combine(ticket)
        self.placement_in_use = None
        self.counters.combine_seconds += self._clock() - now
        return result

    def unavailable(self, step: int) -> torch.Tensor | None:
        """[num_tokens] bool: which of this step's tokens have failed so far for want of a worker that computes one of
        their experts. None if there are none; the others that failed met values that are not finite."""
        return self._unavailable[1] if self._unavailable is not None and self._unavailable[0] == step else None

    def _note_answers(self, layer: Layer) -> None:
        """What the express way has learnt of its workers."""
        assert layer.sent is not None
        for share in layer.sent.shares:
            seconds = share.answered - layer.sent.started
            at_least = seconds if share.waited else 0.0
            self._flights.answered(share.member, share.answered, seconds, share.work, at_least)
            share.member.compute_seconds += share.compute_seconds
            if share.epoch > layer.sent.routing.epoch:
                self.counters.stale_epochs += 1

    def _combine(self, ticket: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather and combine until all rows are finite, or nobody else can be asked."""
        batch = ticket.batch
        hidden = batch.hidden_states.shape[1]
        while True:
            self._gather(ticket)
            rows, failed = kernels.combine_rows(ticket.addresses, batch.topk_weights, hidden, batch.hidden_states.dtype)
            if not failed.any() or not self._recovery.forget_nonfinite(ticket):
                break
        if ticket.hopeless:
            lost = torch.from_numpy(ticket.absent).any(dim=1)
            failed |= lost
            rows[lost] = 0
            before = self.unavailable(batch.step)
            self._unavailable = batch.step, lost if before is None else lost | before
        if ticket.accused and not failed.any():
            for member in ticket.accused:
                member.liveness.quarantine(self._clock())
        return rows, failed

    def _gather(self, layer: Layer) -> None:
        """Bring in every row that can be had."""
        for flight in list(layer.flights):  # the common case: each worker answers in its time
            if not flight.done:
                self._flights.receive(layer, flight, flight.started + flight.member.liveness.hedge_after(flight.work))
        if layer.missing:
            self._recovery.gather(layer)
