"""What a worker group asks of the wire to one worker. A transport file holds both ends of such a wire."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch


class LinkDown(Exception):
    """The wire to a worker is gone: the process died, refused us, or the connection broke."""


class RowsStatus(enum.Enum):
    """How a worker answered."""

    OK = enum.auto()
    NOT_HELD = enum.auto()
    FAILED = enum.auto()


@dataclass(slots=True)  # not frozen, which would cost microseconds in each layer; never changed all the same
class RowsRequest:
    """Rows of one layer for one worker. (step, layer, attempt) name it; an answer with another name is a late one.

    hidden_states: [num_tokens, hidden], all rows of the step; tokens: [num_rows] int32, ascending, which of them go;
    topk_ids: [num_rows, k] int32, the experts that this worker shall compute for each, -1 elsewhere.
    num_pairs: how many ids are not -1.
    """

    step: int
    layer: int
    attempt: int
    epoch: int
    hidden_states: torch.Tensor
    tokens: np.ndarray
    topk_ids: np.ndarray
    num_pairs: int


@dataclass(slots=True)
class RowsReply:
    """A worker's answer.

    address: of [num_pairs, hidden] expert rows, unweighted, contiguous, in the dtype of hidden_states, in order of
    (row, place in the top-k). Valid while `owner` lives and until the next `send` on the same link.
    epoch: the newest placement that the worker was told of. not_held: ids that it does not hold (NOT_HELD).
    """

    step: int
    layer: int
    attempt: int
    status: RowsStatus
    epoch: int = 0
    address: int = 0
    owner: Any = None
    not_held: tuple[int, ...] = ()
    compute_seconds: float = 0.0


@dataclass(slots=True)
class LinkCounters:
    """Bytes of rows and ids that crossed the wire, and requests sent."""

    bytes_sent: int = 0
    bytes_received: int = 0
    requests: int = field(default=0)


class Link(Protocol):
    """The engine's end of the wire to one worker. Used by one thread; `close` may come from any.

    transport: "shm" or "grpc". max_rows: the most rows of one request. depth: how many requests may be unanswered.
    """

    transport: str
    max_rows: int
    depth: int
    counters: LinkCounters

    @property
    def down(self) -> bool:
        """True once the wire is gone for good. Never waits."""
        ...

    @property
    def outstanding(self) -> int:
        """Requests that were sent and not answered yet."""
        ...

    def send(self, request: RowsRequest) -> None:
        """Hand the rows over; returns before they are computed. Raises LinkDown."""
        ...

    def receive(self, deadline: float) -> RowsReply | None:
        """The next answer, in the order of the requests; None if `time.monotonic()` passes `deadline` first.

        A deadline in the past asks without waiting. Raises LinkDown at once when the wire is gone.
        """
        ...

    def close(self) -> None:
        """End the wire and every wait on it. Idempotent."""
        ...
