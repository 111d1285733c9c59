"""The expert pool: what the trunk calls in every MoE layer, in two halves so that other work runs meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from experts import kernels


@dataclass(frozen=True, slots=True)
class DispatchBatch:
    """One layer's rows on their way to the experts.

    hidden_states: [num_tokens, hidden] in the model's dtype. topk_ids: [num_tokens, k] int32.
    topk_weights: [num_tokens, k] float32.
    """

    step: int
    layer: int
    hidden_states: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


class Transport(Protocol):
    """A way to a group of workers."""

    def dispatch(self, batch: DispatchBatch) -> Any:
        """Send the rows; returns a ticket for combine."""
        ...

    def combine(self, ticket: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [num_tokens, hidden] in the model's dtype and failed [num_tokens] bool. A failed row is zero."""
        ...


T = TypeVar("T", bound=Transport)


class Pending:
    """A layer under way."""

    __slots__ = ("_ticket", "_transport")

    def __init__(self, transport: Transport, ticket: Any) -> None:
        self._transport = transport
        self._ticket = ticket

    def wait(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The k expert rows of each token, weighted and added in float32 in top-k order and rounded once.

        Returns rows [num_tokens, hidden] and failed [num_tokens] bool; a failed row is zero and ends only its own
        request.
        """
        return self._transport.combine(self._ticket)


class ExpertPool:
    """Counts the tokens of every expert and hands the rows to a transport."""

    def __init__(self, transport: Transport, num_layers: int, num_experts: int) -> None:
        self._transport = transport
        self._num_experts = num_experts
        self._routed: list[tuple[int, torch.Tensor]] = []
        self._expert_tokens = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        self._counted_layers: tuple[int, ...] = ()
        self._offsets = torch.empty(0)

    def begin(
        self,
        step: int,
        layer: int,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> Pending:
        """Start one layer. Shapes and dtypes as in DispatchBatch."""
        self._note(layer, topk_ids)
        batch = DispatchBatch(step, layer, hidden_states, topk_ids, topk_weights)
        return Pending(self._transport, self._transport.dispatch(batch))

    @property
    def tables(self) -> Mapping[int, kernels.ExpertTable] | None:
        """The experts of each layer, where nothing but the kernels stands before them. A step may then call
        them itself, if it counts their tokens in counter().
        """
        return getattr(self._transport, "tables", None)

    def counter(self, layer: int) -> torch.Tensor:
        """[num_experts] int64: the tokens routed to each expert of a layer so far."""
        return self._expert_tokens[layer]

    @contextlib.contextmanager
    def through(self, around: Callable[[Transport], T]) -> Iterator[T]:
        """While this lasts, what `around` makes of the pool's transport stands before it, to observe what passes."""
        below = self._transport
        self._transport = above = around(below)
        try:
            yield above
        finally:
            self._transport = below

    @property
    def expert_tokens(self) -> torch.Tensor:
        """[num_layers, num_experts] int64: tokens routed to each expert since the start."""
        self._count()
        return self._expert_tokens

    @property
    def counted_tokens(self) -> torch.Tensor:
        """As expert_tokens, without those of the step under way: may be read from any thread."""
        return self._expert_tokens

    def _note(self, layer: int, topk_ids: torch.Tensor) -> None:
        """Remember a layer's choices, to be counted."""
        if self._routed and layer <= self._routed[-1][0]:
            self._count()
        self._routed.append((layer, topk_ids))

    def _count(self) -> None:
        """Fold the step's choices into the counters: once a step, not once a layer, because small calls add up."""
        if not self._routed:
            return
        layers = tuple(layer for layer, _ in self._routed)
        if layers != self._counted_layers:
            self._counted_layers = layers
            self._offsets = torch.tensor(layers).view(-1, 1, 1) * self._num_experts
        ids = torch.stack([topk_ids for _, topk_ids in self._routed]) + self._offsets
        counts = torch.bincount(ids.flatten(), minlength=self._expert_tokens.numel())
        self._expert_tokens += counts.view_as(self._expert_tokens)
        self._routed.clear()
