"""Which format `--format auto` stands for: as stored if that fits this machine, else fewer bits. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from barista.cache import size
from barista.errors import CheckpointError
from experts.checkpoint import Checkpoint
from experts.formats import Holding, holding
from router.expert_memory import resident_bytes
from router.memory import conversation_bytes, held_bytes
from router.model.spec import ModelSpec

AUTO = "auto"
FEWER_BITS = ("int8", "int4")


@dataclass(frozen=True, slots=True)
class FormatChoice:
    """format: what to ask for, where "auto" means: as stored. held: what that is. reason: in words, if there is one."""

    format: str
    held: Holding
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.held.name} ({self.reason})" if self.reason else self.held.name


def choose_format(
    checkpoint: Checkpoint, spec: ModelSpec, wanted: str, free: int | None, expert_memory: int | None = None
) -> FormatChoice:
    """What `wanted` means for this model. free: bytes of memory; None where the weights are on other machines.

    expert_memory: how much of them the experts take at most, if they are limited.

    Raises CheckpointError for shapes that the wanted format cannot take.
    """
    if wanted != AUTO:
        memory_needed(checkpoint, spec, holding(checkpoint, wanted))  # so that its shapes are checked
        return FormatChoice(wanted, holding(checkpoint, wanted))
    stored = holding(checkpoint)
    if free is None:
        return FormatChoice(AUTO, stored)
    needed = {AUTO: memory_needed(checkpoint, spec, stored, expert_memory)}
    for name in FEWER_BITS:
        try:
            needed[name] = memory_needed(checkpoint, spec, holding(checkpoint, name), expert_memory)
        except CheckpointError:  # its shapes cannot be held so
            continue
    name = first_that_fits(needed, free)
    if name == AUTO:
        return FormatChoice(AUTO, stored)
    reason = f"chosen: {stored.name} needs {size(needed[AUTO])}, {size(free)} are free"
    if needed[name] > free:
        reason += f"; {name} needs {size(needed[name])}, and the disk will be read again and again"
    return FormatChoice(name, holding(checkpoint, name), reason)


def first_that_fits(needed: Mapping[str, int], free: int) -> str:
    """The first name, in the order of the mapping, whose bytes are free; the one with the least bytes if none's are."""
    return next((name for name, bytes_ in needed.items() if bytes_ <= free), min(needed, key=needed.__getitem__))


def memory_needed(checkpoint: Checkpoint, spec: ModelSpec, held: Holding, expert_memory: int | None = None) -> int:
    """Bytes of all weights, or of as many experts as may be in memory, and of the KV cache of one conversation."""
    weights = resident_bytes(held_bytes(checkpoint, spec, held), spec, expert_memory)
    return weights + conversation_bytes(spec, held)
