"""What the ranks of a torch.distributed group agree on before the first row travels. Rank 0 decides it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from barista.errors import ConfigError

WAYS = ("all_to_all", "all_gather")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Who is in a group, who holds what, and how rows travel. Rank 0 is the engine and holds no expert.

    members: the workers' names; the first is rank 1. hidden_size: values in a row; dtype: torch's name of theirs.
    owners: by layer the rank of each expert, [num_experts]. numerics_id, digest: of the kernels and of the checkpoint,
    as the engine would compute with them. way: see experts.transport.dist. timeout: seconds after which a rank that has
    not answered is lost; longer than the longest layer takes.
    Raises ConfigError for values that no group could work with.
    """

    members: tuple[str, ...]
    hidden_size: int
    dtype: str
    owners: Mapping[int, tuple[int, ...]]
    numerics_id: str
    digest: str
    way: str = "all_to_all"
    timeout: float = 10.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "owners", MappingProxyType({n: tuple(ranks) for n, ranks in self.owners.items()}))
        if not self.members:
            raise ConfigError("A group of 1 rank has no worker.", "Start at least one.")
        if len(set(self.members)) != len(self.members):
            raise ConfigError(f"Two workers have one name: {', '.join(self.members)}.", "Give each its own.")
        if self.way not in WAYS:
            raise ConfigError(f"Rows cannot travel by {self.way!r}.", f"Choose one of {', '.join(WAYS)}.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"Rows cannot be of {self.dtype!r}.", f"Choose one of {', '.join(DTYPES)}.")
        if self.hidden_size < 1:
            raise ConfigError(f"A row cannot hold {self.hidden_size} values.", "Give the model's hidden size.")
        if not self.timeout > 0:
            raise ConfigError(f"A timeout of {self.timeout} s has passed before it began.", "Give more than 0.")
        for layer, ranks in self.owners.items():
            for expert, rank in enumerate(ranks):
                self._check_owner(layer, expert, rank)

    def _check_owner(self, layer: int, expert: int, rank: int) -> None:
        if rank < 0:
            raise ConfigError(f"Expert {expert} of layer {layer} has no rank.", "Place every expert on a worker.")
        if not 0 < rank < self.world_size:
            raise ConfigError(
                f"Expert {expert} of layer {layer} is on rank {rank}, and the workers are ranks 1 to "
                f"{self.world_size - 1}.",
                "Place it on one of them.",
            )

    @property
    def world_size(self) -> int:
        """Ranks, the engine's among them."""
        return 1 + len(self.members)

    def name(self, rank: int) -> str:
        """For messages."""
        return "the engine" if rank == 0 else self.members[rank - 1]

    def share(self, rank: int) -> dict[int, tuple[int, ...]]:
        """The experts that a rank holds, by layer; a layer of which it holds none is missing."""
        held = {
            layer: tuple(expert for expert, owner in enumerate(ranks) if owner == rank)
            for layer, ranks in self.owners.items()
        }
        return {layer: experts for layer, experts in held.items() if experts}

    def require(
        self, *, hidden_size: int, dtype: str, num_experts: Mapping[int, int], numerics_id: str, digest: str
    ) -> None:
        """Raises ConfigError unless it is about such a worker's model. num_experts: by layer."""
        placed = {layer: len(ranks) for layer, ranks in self.owners.items()}
        for what, here, there in (
            ("hidden_size", hidden_size, self.hidden_size),
            ("dtype", dtype, self.dtype),
            ("experts by layer", dict(num_experts), placed),
            ("numerics_id", numerics_id, self.numerics_id),
            ("digest", digest, self.digest),
        ):
            if here != there:
                remedy = "Start both with one checkpoint and format, on machines of one kind."
                raise ConfigError(f"{what} is {here} here and {there} at the engine.", remedy)

    def to_json(self) -> str:
        """For from_json in another process."""
        fields = {name: value for name, value in vars(self).items() if name != "owners"}
        return json.dumps(fields | {"owners": dict(self.owners)})

    @classmethod
    def from_json(cls, text: str) -> Agreement:
        """What to_json wrote."""
        value = json.loads(text)
        owners = {int(layer): tuple(ranks) for layer, ranks in value["owners"].items()}
        return cls(**value | {"members": tuple(value["members"]), "owners": owners})
