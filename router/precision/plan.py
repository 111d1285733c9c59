"""Which formats of a model are compared, and with what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from barista.config import FORMATS
from barista.errors import CheckpointError, ConfigError
from experts.checkpoint import Checkpoint
from experts.formats import Holding, held_dtype, holding
from router.memory import held_bytes
from router.model.spec import ModelSpec

BY_DEFAULT = ("bf16", "fp8", "int8", "int4", "mxfp4")


@dataclass(frozen=True, slots=True)
class Plan:
    """reference: how the unquantised model is held. formats: those that are compared with it. skipped: the name of each
    that the model's shapes do not take, and why."""

    reference: Holding
    formats: tuple[Holding, ...]
    skipped: dict[str, str]


def plan_formats(
    checkpoint: Checkpoint, spec: ModelSpec, wanted: Sequence[str] | None, reference: str | None = None
) -> Plan:
    """wanted: names as in `--format`; None for every one that the model takes. reference: one such name, or None for
    the model as it is stored, in float32 or bfloat16 and decoded where it is of few bits.

    Raises ConfigError for an unknown name, CheckpointError for a named format that the shapes cannot take.
    """
    against = Holding(held_dtype(checkpoint)) if reference is None else _holding(checkpoint, reference, "--reference")
    if wanted is not None:
        formats = [_holding(checkpoint, name, "--formats") for name in wanted]
        for held in (against, *formats):
            held_bytes(checkpoint, spec, held)  # so that its shapes are checked
        return Plan(against, tuple(dict.fromkeys(formats)), {})
    held_bytes(checkpoint, spec, against)
    taken: list[Holding] = []
    skipped: dict[str, str] = {}
    for held in _by_default(checkpoint, against):
        try:
            held_bytes(checkpoint, spec, held)
            taken.append(held)
        except CheckpointError as error:
            skipped[held.name] = error.message
    return Plan(against, tuple(taken), skipped)


def _by_default(checkpoint: Checkpoint, against: Holding) -> list[Holding]:
    """As it is stored, which may be in blocks of ggml, and in each format; what it is compared with left out."""
    names = ("auto", *BY_DEFAULT)
    return [held for held in dict.fromkeys(holding(checkpoint, name) for name in names) if held != against]


def _holding(checkpoint: Checkpoint, name: str, flag: str) -> Holding:
    if name not in FORMATS:
        raise ConfigError(f"{flag}: {name!r} is no format.", f"Barista knows {', '.join(FORMATS)}.")
    return holding(checkpoint, name)
