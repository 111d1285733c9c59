"""What a model loses in fewer bits, and what it saves: `barista precision`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from experts import kernels
from experts.checkpoint import open_checkpoint
from experts.checkpoint.names import check_names
from router.model.families import model_spec
from router.model.tensors import expert_tensors, ignored_tensors, trunk_tensors
from router.precision.figures import Report
from router.precision.measure import Job, measure
from router.precision.plan import plan_formats
from router.precision.text import Text, text_windows
from router.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """formats, reference: names as plan_formats takes them. num_tokens: of the text to read. threads: to compute on."""

    text: Text
    num_tokens: int
    threads: int
    formats: Sequence[str] | None = None
    reference: str | None = None


def compare_formats(name: str, path: Path, options: Options, progress: Callable[[float, str], None]) -> Report:
    """Measure the checkpoint at `path` in each format. name: what the report calls it.

    Raises ConfigError: an unknown format, too short a text, too little memory; CheckpointError: the files, or a named
    format that the shapes cannot take; CacheError: no room for the reference's logits.
    """
    checkpoint = open_checkpoint(path)
    spec = model_spec(checkpoint.config)
    check_names(trunk_tensors(spec) | expert_tensors(spec), checkpoint, ignored_tensors(spec))
    plan = plan_formats(checkpoint, spec, options.formats, options.reference)
    tokenizer = Tokenizer.from_checkpoint(path)
    windows = text_windows(options.text, tokenizer, options.num_tokens, spec.max_position, spec.vocab_size)
    kernels.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    reference, *formats = measure(Job(checkpoint, spec, windows), plan, progress)
    return Report(
        model=name,
        family=spec.family,
        text=options.text.name,
        text_sha256=options.text.sha256,
        num_tokens=sum(map(len, windows)),
        num_windows=len(windows),
        threads=options.threads,
        reference=reference,
        formats=tuple(formats),
        skipped=plan.skipped,
    )
