"""One worker as the controller knows it."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from barista.placement import ExpertKey
from experts.health.verdict import HEALTHY, Condition, Verdict


class Reach(enum.Enum):
    """Whether a worker answers, and whether its answers are used."""

    STARTING = enum.auto()
    LIVE = enum.auto()
    LOST = enum.auto()
    REFUSED = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A worker's own account: barista.v1.DescribeReply. held: the digest of each expert that it holds.

    verdict: on its GPUs; gpus: what the worker says of each, for whoever asks.
    """

    pid: int
    incarnation: str
    numerics_id: str
    model_digest: bytes
    protocol_version: int
    capacity_bytes: int
    held: Mapping[ExpertKey, bytes]
    draining: bool = False
    term: int = 0
    epoch: int = 0
    verdict: Verdict = HEALTHY
    gpus: tuple[Any, ...] = ()


@dataclass(slots=True)
class Member:
    """A worker's place in the pool.

    held: what it reported, with digests; proven: of that, what a placement may name. loading, releasing: on their way.
    withdrawn: the first epoch that no longer names a replica. draining: gets no experts and gives its own away;
    leaving: ends (stopping) when that is done. since: when `reach` last changed. fault: what its present process did
    wrong, for which it stays refused. given_up: lost for so long that others get its experts. changes: how often `held`
    has changed. replaced: how often its process was ended, since it was last live and well, because it hung or for its
    hardware. domain: the wider failure domain of its node. retired: drained because its hardware is not to be used;
    ends with another process that is well. retire_at: when to try that again. moving: about to be replaced on other
    hardware, and not to be used before. gpus: as the worker last told of them.
    """

    name: str
    since: float
    reach: Reach = Reach.STARTING
    draining: bool = False
    leaving: bool = False
    stopping: bool = False
    address: str = ""
    node: str = ""
    domain: str = ""
    pid: int = 0
    incarnation: str = ""
    numerics_id: str = ""
    protocol_version: int = 0
    capacity_bytes: int = 0
    restarts: int = 0
    detail: str = ""
    fault: str = ""
    misses: int = 0
    changes: int = 0
    retry_at: float = 0.0
    replaced_at: float = -math.inf
    replaced: int = 0
    given_up: bool = False
    verdict: Verdict = HEALTHY
    retired: bool = False
    retire_at: float = -math.inf
    moving: bool = False
    gpus: tuple[Any, ...] = ()
    held: dict[ExpertKey, bytes] = field(default_factory=dict)
    proven: set[ExpertKey] = field(default_factory=set)
    proving: set[ExpertKey] = field(default_factory=set)
    loading: set[ExpertKey] = field(default_factory=set)
    releasing: set[ExpertKey] = field(default_factory=set)
    withdrawn: dict[ExpertKey, int] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """2 for worker-2."""
        return number_of(self.name)

    @property
    def live(self) -> bool:
        """It answers and may be used."""
        return self.reach is Reach.LIVE

    @property
    def failing(self) -> bool:
        """Its hardware is not to be used."""
        return self.verdict.condition is Condition.FATAL

    def forget(self) -> None:
        """What it held and was told is gone."""
        self.changes += 1
        self.held.clear()
        self.proven.clear()
        self.proving.clear()
        self.loading.clear()
        self.releasing.clear()
        self.withdrawn.clear()

    def dropped(self, experts: Iterable[ExpertKey]) -> None:
        """It no longer holds these."""
        for expert in experts:
            self.held.pop(expert, None)
            self.proven.discard(expert)
            self.proving.discard(expert)
            self.releasing.discard(expert)
            self.withdrawn.pop(expert, None)


def worker_name(number: int) -> str:
    """worker-2 for 2."""
    return f"worker-{number}"


def number_of(name: str) -> int:
    """2 for worker-2. Raises ValueError for a name of another form."""
    prefix, _, number = name.rpartition("-")
    if prefix != "worker":
        raise ValueError(name)
    return int(number)
