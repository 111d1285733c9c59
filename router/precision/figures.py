"""What is measured of one format, and what follows from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# "75% less memory, 95% kept": what the project set out to show.
MISSION_SAVED, MISSION_KEPT = 0.75, 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over tokens, and its standard error over windows; None where there is only one window."""

    value: float
    error: float | None


@dataclass(frozen=True, slots=True)
class Loss:
    """perplexity: of the text. perplexity_change: relative to the reference's. kl: KL(reference || format) in nats a
    token, over the whole vocabulary. same_top1: share of tokens after which both find the same token likeliest.
    other_experts: share of (layer, token) pairs for which the gate chose another set of experts; None: no gates."""

    perplexity: float
    perplexity_change: Estimate
    kl: Estimate
    same_top1: Estimate
    other_experts: float | None


@dataclass(frozen=True, slots=True)
class Speed:
    """Decoding one sequence, tokens/s: the median of single steps, and those that a tenth of them are slower and faster
    than."""

    median: float
    slow: float
    fast: float


@dataclass(frozen=True, slots=True)
class Measured:
    """One format. dtype: of the rows. held_bytes: of all weights in memory. active_bytes: those that one token reads.
    numerics: what the numbers depend on beside the weights (experts.numerics)."""

    format: str
    dtype: str
    numerics: str
    held_bytes: int
    active_bytes: int
    loss: Loss
    speed: Speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run. text: its name; text_sha256: of all of it. num_tokens: read, in num_windows pieces.

    reference: the unquantised model, measured as the others are. skipped: why a format was left out, by its name.
    """

    model: str
    family: str
    text: str
    text_sha256: str
    num_tokens: int
    num_windows: int
    threads: int
    reference: Measured
    formats: tuple[Measured, ...]
    skipped: dict[str, str]

    def saved(self, measured: Measured) -> float:
        """Share of the reference's memory that this format does without."""
        return 1 - measured.held_bytes / self.reference.held_bytes

    @property
    def num_predicted(self) -> int:
        """Tokens that were predicted: all but the first of each window."""
        return self.num_tokens - self.num_windows


def speed(step_seconds: Sequence[float]) -> Speed:
    """step_seconds: at least two, of one token each."""
    tenths = statistics.quantiles(step_seconds, n=10, method="inclusive")
    return Speed(1 / statistics.median(step_seconds), 1 / tenths[-1], 1 / tenths[0])
