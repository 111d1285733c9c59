"""How large a group of ranks is, and which rank owns which expert; checked before anything is allocated."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from barista.errors import ConfigError
from experts.expert_parallel.structs import GROUP, MAX_COUNTS, MAX_RANKS, MAX_TOP_K, ShapeStruct

_VALUES = {torch.float32: 0, torch.bfloat16: 1}
_UNIT_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupShape:
    """What all ranks of a group agree on.

    num_sources: how many ranks, the first ones, may have tokens; None for all. max_tokens: that one sends in one layer.
    max_rows: expert rows that a rank takes in one layer, None for as many as could ever come. dtype: of hidden states
    and of expert rows. wire: how rows travel to the experts, "fp8" being e4m3 with a float32 scale for 128 channels.
    combine: "exact" brings each (token, k) row back, "partial" one sum for each owner. to_all: every token to every
    rank, the all-gather that is measured against. alignment: of each expert's rows.

    Raises ConfigError for what the kernels do not take.
    """

    num_ranks: int
    num_experts: int
    max_local_experts: int
    top_k: int
    hidden_size: int
    max_tokens: int
    max_rows: int | None = None
    num_sources: int | None = None
    dtype: torch.dtype = torch.bfloat16
    wire: Literal["values", "fp8"] = "values"
    combine: Literal["exact", "partial"] = "exact"
    to_all: bool = False
    alignment: int = 1

    def __post_init__(self) -> None:
        self._check("num_ranks", self.num_ranks, MAX_RANKS)
        self._check("num_experts", self.num_experts, 1 << 16)
        self._check("max_local_experts", self.max_local_experts, MAX_COUNTS // self.num_ranks)
        self._check("top_k", self.top_k, min(MAX_TOP_K, self.num_experts))
        self._check("hidden_size", self.hidden_size, 1 << 16)
        self._check("max_tokens", self.max_tokens, 1 << 20)
        self._check("num_sources", self.sources, self.num_ranks)
        self._check("alignment", self.alignment, 1 << 10)
        if self.dtype not in _VALUES:
            raise ConfigError(f"dtype is {self.dtype}.", "The expert-parallel kernels take float32 and bfloat16.")
        row_bytes = self.hidden_size * self.dtype.itemsize
        if row_bytes % _UNIT_BYTES:
            raise ConfigError(
                f"a row of {self.hidden_size} values of {self.dtype} has {row_bytes} bytes.",
                f"The kernels move rows of a multiple of {_UNIT_BYTES} bytes.",
            )
        if self.wire == "fp8" and self.hidden_size % GROUP:
            raise ConfigError(
                f"hidden_size is {self.hidden_size}, which FP8 scales of {GROUP} channels do not divide.",
                'Let rows travel as they are (wire "values").',
            )
        if self.to_all and self.combine != "partial":
            raise ConfigError("to_all is set, but combine is exact.", 'Use combine "partial" with it.')
        self._check("max_rows", self.rows, 1 << 26)
        if self.rows % self.alignment:
            raise ConfigError(
                f"max_rows is {self.rows}, no multiple of alignment ({self.alignment}).", "Round it up to one."
            )

    def _check(self, name: str, value: int, most: int) -> None:
        if not 1 <= value <= most:
            raise ConfigError(f"{name} is {value}.", f"The expert-parallel kernels take 1 to {most}.")

    @property
    def sources(self) -> int:
        """Ranks that may have tokens."""
        return self.num_ranks if self.num_sources is None else self.num_sources

    @property
    def rows(self) -> int:
        """max_rows, or the rows of the worst layer: all tokens of all sources choose as many of one rank as can be."""
        if self.max_rows is not None:
            return self.max_rows
        pairs = self.sources * self.max_tokens * min(self.top_k, self.max_local_experts)
        padding = min(self.max_local_experts, pairs) * (self.alignment - 1)
        return -(-(pairs + padding) // self.alignment) * self.alignment

    def struct(self) -> ShapeStruct:
        """As the kernels know it."""
        return ShapeStruct(
            size=ctypes.sizeof(ShapeStruct),
            num_ranks=self.num_ranks,
            num_experts=self.num_experts,
            max_local_experts=self.max_local_experts,
            top_k=self.top_k,
            max_tokens=self.max_tokens,
            max_rows=self.rows,
            hidden=self.hidden_size,
            value=_VALUES[self.dtype],
            wire=int(self.wire == "fp8"),
            combine=int(self.combine == "partial"),
            routing=int(self.to_all),
            alignment=self.alignment,
            num_sources=self.sources,
        )


def shape_to_json(shape: GroupShape) -> dict[str, object]:
    """For shape_from_json in another process."""
    return asdict(shape) | {"dtype": str(shape.dtype).removeprefix("torch.")}


def shape_from_json(value: dict[str, Any]) -> GroupShape:
    """What shape_to_json made. Raises ConfigError."""
    return GroupShape(**(value | {"dtype": getattr(torch, value["dtype"])}))


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """Which rank owns each expert, and which of that rank's experts it is: both of one entry for each expert.

    ranks: -1 for an expert that nobody owns. A rank's experts are numbered in order of their ids.
    """

    ranks: tuple[int, ...]
    indices: tuple[int, ...]

    @classmethod
    def of(cls, ranks: Sequence[int], num_ranks: int) -> ExpertMap:
        """Raises ConfigError for a rank that the group does not have."""
        held = [0] * num_ranks
        indices = []
        for expert, rank in enumerate(ranks):
            if not -1 <= rank < num_ranks:
                raise ConfigError(f"expert {expert} is on rank {rank}.", f"The group has ranks 0 to {num_ranks - 1}.")
            indices.append(held[rank] if rank >= 0 else -1)
            held[rank] += rank >= 0
        return cls(tuple(ranks), tuple(indices))

    @classmethod
    def even(cls, num_experts: int, owners: Sequence[int], num_ranks: int) -> ExpertMap:
        """Neighbouring experts together, the first owners with one more where they do not divide."""
        return cls.of([owners[expert * len(owners) // num_experts] for expert in range(num_experts)], num_ranks)

    @classmethod
    def redealt(cls, num_experts: int, shares: Sequence[Collection[int]], num_ranks: int) -> ExpertMap:
        """Owners keep what they have; what nobody has goes, in order, to whoever has the least.

        shares: the experts of the last len(shares) ranks, none of them twice.
        """
        first = num_ranks - len(shares)
        ranks = [-1] * num_experts
        held = [len(share) for share in shares]
        for owner, share in enumerate(shares):
            for expert in share:
                ranks[expert] = first + owner
        for expert in range(num_experts):
            if ranks[expert] < 0:
                least = held.index(min(held))
                ranks[expert] = first + least
                held[least] += 1
        return cls.of(ranks, num_ranks)

    def local(self, rank: int) -> tuple[int, ...]:
        """The ids of a rank's experts, in order of their indices."""
        return tuple(expert for expert, owner in enumerate(self.ranks) if owner == rank)

    def most(self) -> int:
        """Experts of the rank that has most of them; at least 1."""
        return max((index + 1 for index in self.indices), default=0) or 1
