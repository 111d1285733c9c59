"""One layer on its way through a worker group: who carries which pairs, what has come in, what has failed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from experts.link import Link, RowsReply, RowsRequest
from experts.pool import DispatchBatch
from experts.roster import Member

if TYPE_CHECKING:
    from experts.express import Sent


@dataclass(slots=True, eq=False)
class Flight:
    """One worker's share of a layer, on its way. link: as of its start, because a lost one is soon replaced.

    unsent: parts that wait until the wire has room. looked: when its answer was last looked for in vain.
    """

    member: Member
    link: Link
    unsent: deque[RowsRequest]
    sent: deque[RowsRequest] = field(default_factory=deque)
    work: int = 0
    started: float = 0.0
    looked: float = 0.0
    hedged: bool = False
    late: bool = False

    def owed(self, shape: tuple[int, ...]) -> np.ndarray:
        """[num_tokens, k] int32: the expert ids of the pairs that have not been answered, -1 elsewhere."""
        ids = np.full(shape, -1, dtype=np.int32)
        for request in (*self.sent, *self.unsent):
            ids[request.tokens] = request.topk_ids
        return ids

    @property
    def done(self) -> bool:
        return not self.sent and not self.unsent


@dataclass(slots=True, eq=False)
class Placed:
    """Rows that have come in. detached: copied out of the member's window."""

    member: Member
    request: RowsRequest
    reply: RowsReply
    detached: bool = False


@dataclass(slots=True, eq=False)
class Layer:
    """A layer under way, and the ticket for it.

    addresses: [num_tokens, k] int64, where each pair's expert row lies, 0 while it is missing. missing: how many are
    waited for. excluded: (member index, expert) pairs that have failed in this layer. accused: who gave rows that are
    not finite. hopeless: experts that are not waited for any more. sent: how it went out, if by the express way.
    """

    batch: DispatchBatch
    topk_ids: np.ndarray
    addresses: np.ndarray
    started: float
    missing: int = 0
    attempt: int = 0
    flights: list[Flight] = field(default_factory=list)
    excluded: set[tuple[int, int]] = field(default_factory=set)
    placed: list[Placed] = field(default_factory=list)
    accused: set[Member] = field(default_factory=set)
    hopeless: set[int] = field(default_factory=set)
    sent: Sent | None = None

    @property
    def row_bytes(self) -> int:
        return self.batch.hidden_states.shape[1] * self.batch.hidden_states.itemsize

    @property
    def wanted(self) -> np.ndarray:
        """[num_tokens, k] int32: topk_ids, with -1 for what is hopeless."""
        if not self.hopeless:
            return self.topk_ids
        hopeless = np.isin(self.topk_ids, list(self.hopeless))
        return np.where(hopeless, np.int32(-1), self.topk_ids)

    @property
    def absent(self) -> np.ndarray:
        """[num_tokens, k] bool: pairs whose rows have not come in."""
        missing: np.ndarray = (self.addresses == 0) & (self.topk_ids >= 0)
        return missing

    def recount(self) -> None:
        """Bring `missing` up to date with the addresses and with what is hopeless."""
        self.missing = int(np.count_nonzero((self.addresses == 0) & (self.wanted >= 0)))

    def give_up(self, experts: Iterable[int]) -> None:
        """Wait for these experts no longer."""
        self.hopeless.update(experts)
        self.recount()
