"""Rows between nodes over torch.distributed: the engine's and the workers' end. The engine is rank 0 of a group.

A worker waits for a header of int64 values, which tells it that rows of a layer come; it lies in memory whatever the
rows' device. Then rows travel in one of two ways:

all_to_all: a token's row goes once to each rank that holds some of its experts, and expert rows come back one by one,
  each rounded to the model's dtype; the engine weights and adds them in float32 in top-k order and rounds once. The
  bytes are those of LocalTransport. Since all rows start and end at rank 0, the exchange is written as sends and
  receives, of which NCCL's all_to_all_single is made, too. gloo's sends an empty message between every two workers as
  well: that takes about twice as long, and each worker then waits for every other one.
all_gather: every row goes to every rank, and the ranks' weighted sums are added on the way back (all-gather and
  reduce-scatter; with one engine these are a broadcast and a reduction). The sums are float32, but their order is that
  of the ranks: NOT the bytes of LocalTransport.

A worker that cannot compute answers with rows that are not finite, which fail their tokens and nothing else.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from experts.pool import DispatchBatch
from experts.transport.dist_agreement import Agreement
from experts.transport.dist_group import FOREVER, Group, GroupBroken, Works
from experts.transport.dist_rows import (
    check_batch,
    combine_anywhere,
    combine_on_cpu,
    pack,
    places_of,
    rounded,
    split_rows,
    unpack,
    weighted_sum,
)

logger = logging.getLogger(__name__)

# (layer, hidden_states [n, hidden], topk_ids [n, k] int32, -1 for none) -> expert rows [num_pairs, hidden], unweighted,
# in order of (token, place in the top-k), in the dtype and on the device of hidden_states.
ExpertRows = Callable[[int, Tensor, Tensor], Tensor]

_STOP, _LAYER = 0, 1


class Header(NamedTuple):
    """What is coming. num_rows: rows for the receiver; num_pairs: expert rows that it shall compute for them."""

    verb: int
    step: int = 0
    layer: int = 0
    num_rows: int = 0
    top_k: int = 0
    num_pairs: int = 0

    def tensor(self) -> Tensor:
        """As it travels."""
        return torch.tensor(self)

    @classmethod
    def receive(cls, group: Group) -> Header:
        """Wait for the engine, however long it is idle."""
        values = torch.empty(len(cls._fields), dtype=torch.int64)
        group.receive({0: values}).wait(FOREVER)
        return cls(*values.tolist())


@dataclass(slots=True)
class Flight:
    """A layer under way. way: by which it was sent, None if the group was broken then.

    received: room for what comes back, as its way needs it; places: see dist_rows.Split.
    """

    batch: DispatchBatch
    way: Way | None = None
    works: tuple[Works, ...] = ()
    received: Tensor | None = None
    places: Tensor | None = None


class DistTransport:
    """An experts.pool.Transport over a group's workers. broken: why no row can be had any more, None while all is well.

    What is lost with a group are rows of the layers under way: they fail, and so do all later ones, at once, until
    `restart`. Raises BaristaError for a batch that does not fit the agreement, before anything is sent.
    """

    def __init__(self, group: Group, agreement: Agreement) -> None:
        self.restart(group, agreement)

    def restart(self, group: Group, agreement: Agreement) -> None:
        """Go on with another group, after `leave` or once broken. What was under way before stays failed."""
        self.broken: str | None = None
        self._group, self._agreement = group, agreement
        self._way = _WAYS[agreement.way](group, agreement)

    @property
    def exact(self) -> bool:
        """Whether the bytes are those of LocalTransport."""
        return self._way.exact

    def dispatch(self, batch: DispatchBatch) -> Flight:
        """Start sending the rows."""
        check_batch(batch, self._agreement)
        if self.broken is None:
            try:
                return self._way.dispatch(batch)
            except GroupBroken as error:
                self._break(batch, error)
        return Flight(batch)

    def combine(self, ticket: Flight) -> tuple[Tensor, Tensor]:
        """Wait for the rows, and add them up."""
        if self.broken is None and ticket.way is self._way:  # and not that of a group before this one
            try:
                for works in ticket.works:
                    works.wait()
                return self._way.combine(ticket)
            except GroupBroken as error:
                self._break(ticket.batch, error)
        hidden_states = ticket.batch.hidden_states
        failed = torch.ones(len(hidden_states), dtype=torch.bool, device=hidden_states.device)
        return torch.zeros_like(hidden_states, memory_format=torch.contiguous_format), failed

    def leave(self) -> None:
        """End the group; its workers are free for another one. Idempotent."""
        if self.broken is None:
            self.broken = "the engine has left"
            self._group.leave()

    def stop(self) -> None:
        """As leave, and the workers end."""
        if self.broken is None:
            try:
                self._group.send(dict.fromkeys(range(1, self._group.size), Header(_STOP).tensor())).wait()
            except GroupBroken as error:
                logger.warning("not every worker could be told to end: %s", error)
            self.leave()

    def _break(self, batch: DispatchBatch, error: GroupBroken) -> None:
        """The group is lost, which is said here and nowhere else."""
        self.broken = f"step {batch.step}, layer {batch.layer}: {error}"
        logger.warning("the group of %d ranks is lost: %s", self._group.size, self.broken)
        self._group.leave()  # so that no worker waits for what does not come


def serve(group: Group, agreement: Agreement, rows: ExpertRows) -> None:
    """A worker's end: answer layer after layer until the engine says stop. Raises GroupBroken when it no longer can."""
    way = _WAYS[agreement.way](group, agreement)
    while (header := Header.receive(group)).verb == _LAYER:
        way.answer(header, rows)


class Way(ABC):
    """How rows travel. exact: whether the bytes are those of LocalTransport."""

    exact: bool

    def __init__(self, group: Group, agreement: Agreement) -> None:
        self._group = group
        self._hidden_size = agreement.hidden_size
        self._dtype: torch.dtype = getattr(torch, agreement.dtype)
        self._owners = {layer: torch.tensor(ranks, device=group.device) for layer, ranks in agreement.owners.items()}

    @abstractmethod
    def dispatch(self, batch: DispatchBatch) -> Flight:
        """The engine: start sending, and make room for what comes back. Raises GroupBroken."""

    @abstractmethod
    def combine(self, flight: Flight) -> tuple[Tensor, Tensor]:
        """The engine, once everything has come: as Transport.combine."""

    @abstractmethod
    def answer(self, header: Header, rows: ExpertRows) -> None:
        """A worker: receive, compute, send back. Raises GroupBroken."""

    def _room(self, num_rows: int, *columns: tuple[torch.dtype, int]) -> Tensor:
        """For a message of packed rows."""
        width = sum(dtype.itemsize * length for dtype, length in columns)
        return torch.empty((num_rows, width), dtype=torch.uint8, device=self._group.device)


class AllToAll(Way):
    """Rows to the ranks that need them, expert rows back: exact."""

    exact = True

    def dispatch(self, batch: DispatchBatch) -> Flight:
        """Only the ranks that hold one of the chosen experts hear of the layer."""
        group, top_k = self._group, batch.topk_ids.shape[1]
        split = split_rows(batch.topk_ids, self._owners[batch.layer], group.size)
        messages = pack(split.topk_ids, batch.hidden_states[split.tokens])
        # One more row, of zeros: the place -1 of pairs that nobody was asked for.
        received = messages.new_empty((sum(split.num_pairs) + 1, self._hidden_size), dtype=self._dtype)
        received[-1] = 0
        ranks = [rank for rank, num_rows in enumerate(split.num_rows) if num_rows]
        headers = {
            rank: Header(_LAYER, batch.step, batch.layer, split.num_rows[rank], top_k, split.num_pairs[rank]).tensor()
            for rank in ranks
        }
        outgoing, incoming = torch.split(messages, split.num_rows), torch.split(received[:-1], split.num_pairs)
        works = (
            group.send(headers),
            group.send({rank: outgoing[rank] for rank in ranks}),
            group.receive({rank: incoming[rank] for rank in ranks}),
        )
        return Flight(batch, self, works, received, split.places)

    def combine(self, flight: Flight) -> tuple[Tensor, Tensor]:
        """Weight and add in float32 in top-k order, and round once."""
        assert flight.received is not None
        assert flight.places is not None
        add = combine_on_cpu if flight.received.device.type == "cpu" else combine_anywhere
        return add(flight.received, flight.places, flight.batch.topk_weights)

    def answer(self, header: Header, rows: ExpertRows) -> None:
        """See Way."""
        columns = (torch.int32, header.top_k), (self._dtype, self._hidden_size)
        message = self._room(header.num_rows, *columns)
        self._group.receive({0: message}).wait()
        topk_ids, hidden_states = unpack(message, *columns)
        out = compute(rows, header.layer, hidden_states, topk_ids, header.num_pairs)
        self._group.send({0: out}).wait()


class AllGather(Way):
    """Rows to all ranks, the sum of their sums back: not exact."""

    exact = False

    def dispatch(self, batch: DispatchBatch) -> Flight:
        """Every rank takes part, whether it holds one of the chosen experts or not."""
        group, num_tokens, top_k = self._group, *batch.topk_ids.shape
        total = torch.zeros((num_tokens, self._hidden_size), device=group.device)
        if num_tokens == 0:
            return Flight(batch, self, (), total)
        header = Header(_LAYER, batch.step, batch.layer, num_tokens, top_k).tensor()
        works = (
            group.send(dict.fromkeys(range(1, group.size), header)),
            group.broadcast(pack(batch.topk_ids, batch.topk_weights, batch.hidden_states)),
            group.reduce(total),
        )
        return Flight(batch, self, works, total)

    def combine(self, flight: Flight) -> tuple[Tensor, Tensor]:
        """Round the sum."""
        assert flight.received is not None
        return rounded(flight.received, self._dtype)

    def answer(self, header: Header, rows: ExpertRows) -> None:
        """See Way."""
        columns = (torch.int32, header.top_k), (torch.float32, header.top_k), (self._dtype, self._hidden_size)
        message = self._room(header.num_rows, *columns)
        self._group.broadcast(message).wait()
        topk_ids, topk_weights, hidden_states = unpack(message, *columns)
        mine = (topk_ids >= 0) & (self._owners[header.layer][topk_ids] == self._group.rank)
        num_pairs = int(mine.sum())
        out = hidden_states.new_zeros((num_pairs + 1, self._hidden_size))
        out[:-1] = compute(rows, header.layer, hidden_states, topk_ids.masked_fill(~mine, -1), num_pairs)
        self._group.reduce(weighted_sum(out, places_of(mine), topk_weights)).wait()


def compute(rows: ExpertRows, layer: int, hidden_states: Tensor, topk_ids: Tensor, num_pairs: int) -> Tensor:
    """The expert rows [num_pairs, hidden], contiguous; all NaN if they cannot be had, so that their tokens fail."""
    shape = (num_pairs, hidden_states.shape[1])
    try:
        out = rows(layer, hidden_states, topk_ids)
    except Exception:
        logger.exception("the experts of layer %d could not be computed", layer)
    else:
        if out.shape == shape and out.dtype is hidden_states.dtype:
            return out.contiguous()
        logger.error("the experts of layer %d gave rows %s of %s, not %s", layer, tuple(out.shape), out.dtype, shape)
    return hidden_states.new_full(shape, torch.nan)


_WAYS: dict[str, type[Way]] = {"all_to_all": AllToAll, "all_gather": AllGather}
