"""The bytes that a cycle of ranks on one GPU must move at least, and from them the shortest time that it can take.

U is the number of ranks that a token goes to. Every row that is read or written once counts once; what an owner and a
source tell each other beside rows counts too. Indices of a source's own (slots, ordinals) stay in its caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

GROUP = 128
PAIR_BYTES = 8  # an expert and an ordinal


@dataclass(frozen=True, slots=True, kw_only=True)
class Cycle:
    """tokens: of all ranks together. copies: rows in other windows or the own one, U x tokens. pairs: (token, k)."""

    tokens: int
    copies: int
    pairs: int
    hidden: int
    top_k: int
    fp8: bool

    @property
    def _row(self) -> int:
        return self.hidden + 4 * self.hidden // GROUP if self.fp8 else 2 * self.hidden

    @property
    def dispatch(self) -> int:
        """Each token read once, and written once to each rank that it goes to."""
        return self.tokens * 2 * self.hidden + self.copies * (self._row + PAIR_BYTES * self.top_k)

    @property
    def expand(self) -> int:
        """Each received row read once, and written once for each pair."""
        return (self.copies + self.pairs) * self._row

    @property
    def reduce(self) -> int:
        """Each expert row read once, and one sum written for each received row."""
        return (self.pairs + self.copies) * 2 * self.hidden

    @property
    def combine_exact(self) -> int:
        """Each expert row read once, each token written once."""
        return (self.pairs + self.tokens) * 2 * self.hidden

    @property
    def combine_partial(self) -> int:
        """Each owner's sum read once, each token written once."""
        return (self.copies + self.tokens) * 2 * self.hidden


def expected_copies(num_ranks: int, num_experts: int, top_k: int) -> float:
    """U for ids drawn evenly, without replacement: ranks that own at least one of the k experts."""
    per_rank = num_experts // num_ranks
    return num_ranks * (1 - comb(num_experts - per_rank, top_k) / comb(num_experts, top_k))


def expert_layer_bytes(distinct: int, pairs: int, hidden: int, intermediate: int, weight_bytes: float) -> float:
    """Of one MoE layer on one GPU: the matrices of the experts that are woken, and each pair's row in and out."""
    return distinct * 3 * hidden * intermediate * weight_bytes + pairs * 2 * 2 * hidden
