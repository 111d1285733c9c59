"""Every format of a model against the unquantised one, with one model in memory at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from barista.cache import cache_root, require_space
from barista.machine import available_memory
from experts.checkpoint import Checkpoint
from experts.formats import Holding
from experts.numerics import numerics_id
from router.inspect import active_bytes
from router.memory import held_bytes, require_room_for_trunk
from router.model.load import load_model
from router.model.spec import ModelSpec
from router.precision.figures import Loss, Measured, speed
from router.precision.plan import Plan
from router.precision.reference import Reference
from router.precision.run import DECODE_TOKENS, WindowRead, decode_seconds, read_windows

Progress = Callable[[float, str], None]

LOADED, READ = 0.3, 0.95  # shares of a format's progress, when its model is there and the text is read


@dataclass(frozen=True, slots=True)
class Job:
    """A model and what it reads: windows of token ids, all of one length."""

    checkpoint: Checkpoint
    spec: ModelSpec
    windows: Sequence[Sequence[int]]

    @property
    def logits_bytes(self) -> int:
        """Of all logits in float32."""
        return 4 * self.spec.vocab_size * sum(map(len, self.windows))


def measure(job: Job, plan: Plan, progress: Progress) -> list[Measured]:
    """The reference first, then each format.

    Raises CacheError if the reference's logits do not fit on the cache's disk, ConfigError if a trunk does not fit into
    memory, CheckpointError as load_model does, or for logits that are not finite.
    """
    cache_root().mkdir(parents=True, exist_ok=True)
    require_space(cache_root(), job.logits_bytes)
    total = 1 + len(plan.formats)
    with tempfile.TemporaryFile(dir=cache_root()) as stream:
        reference = Reference(stream, job.windows)
        measured = [_measure(job, plan.reference, reference.record, _part(progress, 0, total))]
        for index, held in enumerate(plan.formats, start=1):
            measured.append(_measure(job, held, reference.compare, _part(progress, index, total)))
    return measured


def _measure(job: Job, held: Holding, losses: Callable[[Iterable[WindowRead]], Loss], progress: Progress) -> Measured:
    require_room_for_trunk(job.checkpoint, held, available_memory())
    dtype: torch.dtype = getattr(torch, held.dtype)
    model = load_model(
        job.checkpoint,
        dtype,
        max(len(job.windows[0]), DECODE_TOKENS),
        lambda fraction, message: progress(LOADED * fraction, f"{held.name}, {message}"),
        weight_format=held.format,
    )
    loss = losses(_reported(read_windows(model, job.windows), len(job.windows), held.name, progress))
    progress(READ, f"{held.name}, decoding")
    weights = held_bytes(job.checkpoint, job.spec, held)
    return Measured(
        format=held.name,
        dtype=held.dtype,
        numerics=numerics_id(dtype, held.format),
        held_bytes=sum(weights.values()),
        active_bytes=active_bytes(job.spec, weights),
        loss=loss,
        speed=speed(decode_seconds(model, job.windows[0])),
    )


def _reported(reads: Iterable[WindowRead], count: int, name: str, progress: Progress) -> Iterator[WindowRead]:
    for index, read in enumerate(reads):
        progress(LOADED + (READ - LOADED) * index / count, f"{name}, window {index + 1} of {count}")
        yield read


def _part(progress: Progress, index: int, total: int) -> Progress:
    """The progress of one of `total` equal parts."""
    return lambda fraction, message: progress((index + fraction) / total, message)
