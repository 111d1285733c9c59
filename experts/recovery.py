"""What happens to a layer that does not come in as it should: workers that are late, gone or wrong, and their pairs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from experts import kernels
from experts.flights import Flights, GroupCounters
from experts.layer import Flight, Layer, Placed
from experts.liveness import EXPERT_COST
from experts.on_demand import OnDemandLoader
from experts.roster import Roster, Routing

POLL_SECONDS = 0.0005
# A worker that is late for so long, and the only one with an expert, is given up: a survivor loads the expert.
HANG_SECONDS = 1.0
# How long a step may wait for experts that nobody holds, before the rows that need them fail.
LOAD_SECONDS = 30.0
# How long it may wait for a replica that is out of reach, when those in reach have failed.
SECOND_OPINION_SECONDS = 1.0


class Recovery:
    """Hedges, resends and gives up for a worker group.

    given_up: layer -> experts that a step has waited for in vain; nobody waits for them again until somebody who can
    answer holds them.
    """

    def __init__(
        self,
        roster: Roster,
        loader: OnDemandLoader,
        flights: Flights,
        counters: GroupCounters,
        clock: Callable[[], float],
    ) -> None:
        self._roster = roster
        self._loader = loader
        self._flights = flights
        self._counters = counters
        self._clock = clock
        self.given_up: dict[int, set[int]] = {}
        self._step = -1
        self._waited = 0.0  # seconds, in this step so far

    def forsake(self, layer: Layer, routing: Routing) -> None:
        """Give up the layer's experts that have been given up before, but for those that are back."""
        number = layer.batch.layer
        experts = self.given_up.get(number)
        if not experts:
            return
        experts -= {expert for expert in experts if any(map(routing.can_answer, routing.holders[expert]))}
        if not experts:
            del self.given_up[number]
        lost = experts.intersection(layer.topk_ids.flat)
        if lost:
            layer.give_up(lost)
            self._loader.want(number)

    def gather(self, layer: Layer) -> None:
        """Bring in every row that can still be had."""
        step = layer.batch.step
        if step != self._step:
            self._step, self._waited = step, 0.0
        since = self._clock()
        while layer.missing:
            self._attend(layer, since)
        self._waited += self._clock() - since

    def _attend(self, layer: Layer, since: float) -> None:
        """One look at a layer that does not come in as it should. since: when the first was taken."""
        for flight in list(layer.flights):  # look at all before judging any: it may be us who were away
            self._flights.receive(layer, flight, 0.0)
        layer.flights = [flight for flight in layer.flights if not flight.done]
        now = self._clock()
        for flight in list(layer.flights):
            self._judge(layer, flight, now)
        carried = np.zeros(layer.topk_ids.shape, dtype=np.bool_)
        for flight in layer.flights:
            carried |= flight.owed(carried.shape) >= 0
        orphans = np.where(carried | (layer.addresses != 0), np.int32(-1), layer.wanted)
        if (orphans >= 0).any():
            self._resend(layer, orphans, now)
        if self._waited + now - since > LOAD_SECONDS:
            self._give_up(layer)
            return
        waiting = [flight for flight in layer.flights if not flight.done]
        if not waiting:
            self._roster.wait_changed(POLL_SECONDS)
        for flight in waiting:
            self._flights.receive(layer, flight, self._clock() + POLL_SECONDS / len(waiting))

    def forget_nonfinite(self, layer: Layer) -> bool:
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

    def _give_up(self, layer: Layer) -> None:
        """Wait no longer for what is absent, nor, in the layers and steps to come, for anything that nobody holds."""
        absent = np.unique(layer.topk_ids[layer.absent]).tolist()
        layer.give_up(absent)
        for number, expert in (*self._roster.uncovered(well=True), *((layer.batch.layer, expert) for expert in absent)):
            self.given_up.setdefault(number, set()).add(expert)

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
                self._counters.resends += 1
        elif (
            not flight.hedged
            and waited > liveness.hedge_after(flight.work)
            and (liveness.new or self._flights.budget.take())
        ):
            flight.hedged = True
            if self._duplicate(layer, flight):
                self._counters.hedges += 1

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
            self._counters.resends += 1
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
        self._flights.send_to_owners(layer, topk_ids, owner, routing)
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
            self._counters.nonfinite_rows += int(bad.sum())
            layer.accused.add(placed.member)
            layer.excluded.update((placed.member.index, int(expert)) for expert in np.unique(layer.topk_ids[bad]))
        return bad
