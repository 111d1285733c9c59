"""The figures of a run: pure functions of its records."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from barista.errors import ConfigError
from router.bench.record import Answer, Failure, Record

MILLISECONDS = 1000.0
SLO_NAMES = ("ttft", "tpot", "e2el")

Slos = Mapping[str, float]  # some of SLO_NAMES -> milliseconds


@dataclass(frozen=True)
class Distribution:
    """Milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One run. The names are those of `vllm bench serve` where it has the figure.

    duration: seconds from the first request's start to the last one's end. failures: kind -> requests.
    request_throughput, output_throughput: answered requests, and their tokens, per second of duration.
    request_goodput: answered requests per second that meet every SLO; goodput_share: of all requests, failed ones
    included; both None without SLOs. counted_by: whose count the output tokens are, see Answer.output_tokens.
    chunk_tokens: output tokens per chunk with text. total_input_tokens: None unless the server counts.
    ttft_ms, tpot_ms, e2el_ms: over answers; itl_ms: over all gaps of all answers, see record.Answer; lag_ms: how long
    after its start an answered request was sent. None where nothing was measured.
    """

    completed: int
    failed: int
    failures: dict[str, int]
    duration: float
    request_throughput: float
    output_throughput: float
    request_goodput: float | None
    goodput_share: float | None
    total_input_tokens: int | None
    total_output_tokens: int
    counted_by: Literal["usage", "chunks", "both"]
    chunk_tokens: float | None
    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2el_ms: Distribution | None
    lag_ms: Distribution | None


def summarise(records: Sequence[Record], slos: Slos) -> Summary:
    """The figures of all records, in any order. A failure counts as a failure and adds to no latency."""
    answers = [record for record in records if isinstance(record, Answer)]
    failures = Counter(record.kind for record in records if isinstance(record, Failure))
    duration = max(r.end for r in records) - min(r.start for r in records) if records else 0.0
    output_tokens = sum(answer.output_tokens for answer in answers)
    chunks = sum(len(answer.chunks) for answer in answers)
    good = sum(meets(answer, slos) for answer in answers) if slos else None
    prompts = [answer.prompt_tokens for answer in answers if answer.prompt_tokens is not None]
    return Summary(
        completed=len(answers),
        failed=failures.total(),
        failures=dict(failures.most_common()),
        duration=duration,
        request_throughput=_per(len(answers), duration),
        output_throughput=_per(output_tokens, duration),
        request_goodput=None if good is None else _per(good, duration),
        goodput_share=None if good is None else _per(good, len(records)),
        total_input_tokens=sum(prompts) if answers and len(prompts) == len(answers) else None,
        total_output_tokens=output_tokens,
        counted_by=_counted_by(answers),
        chunk_tokens=output_tokens / chunks if chunks else None,
        ttft_ms=distribution(answer.ttft for answer in answers),
        tpot_ms=distribution(answer.tpot for answer in answers if answer.tpot is not None),
        itl_ms=distribution(gap for answer in answers for gap in answer.itl),
        e2el_ms=distribution(answer.e2el for answer in answers),
        lag_ms=distribution(answer.sent - answer.start for answer in answers),
    )


def meets(answer: Answer, slos: Slos) -> bool:
    """Whether an answer meets every SLO (DistServe, arXiv 2401.09670). One token has no TPOT and meets any."""
    took = {"ttft": answer.ttft, "tpot": answer.tpot or 0.0, "e2el": answer.e2el}
    return all(took[name] * MILLISECONDS <= limit for name, limit in slos.items())


def parse_slos(texts: Iterable[str]) -> dict[str, float]:
    """["ttft:500", "tpot:50"] -> {"ttft": 500.0, "tpot": 50.0}, in milliseconds. Raises ConfigError."""
    slos = {}
    for text in texts:
        name, _, limit = text.partition(":")
        slos[name] = _positive(limit)
        if name not in SLO_NAMES or math.isnan(slos[name]):
            raise ConfigError(
                f"--goodput {text} is no service-level objective.",
                f"Give one of {', '.join(SLO_NAMES)} and milliseconds, as in --goodput ttft:500.",
            )
    return slos


def distribution(seconds: Iterable[float]) -> Distribution | None:
    """Times in seconds as a distribution in milliseconds; None if there are none."""
    values = sorted(value * MILLISECONDS for value in seconds)
    if not values:
        return None
    p50, p90, p99 = (percentile(values, q) for q in (50, 90, 99))
    return Distribution(math.fsum(values) / len(values), p50, p90, p99, values[-1])


def percentile(ascending: Sequence[float], q: float) -> float:
    """The q-th percentile, 0 to 100, of at least one value, interpolated linearly between the two closest ranks.

    The value at rank (n - 1) q / 100 counted from 0: numpy's default, and so vLLM's (Hyndman and Fan's type 7).
    """
    rank = (len(ascending) - 1) * q / 100
    low = ascending[math.floor(rank)]
    high = ascending[math.ceil(rank)]
    return low + (high - low) * (rank - math.floor(rank))


def _per(count: int, whole: float) -> float:
    return count / whole if whole else 0.0


def _counted_by(answers: Sequence[Answer]) -> Literal["usage", "chunks", "both"]:
    by_usage = {bool(answer.completion_tokens) for answer in answers}
    if len(by_usage) == 2:
        return "both"
    return "chunks" if False in by_usage else "usage"


def _positive(text: str) -> float:
    """The number, or NaN if it is not positive and finite."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if 0 < value < math.inf else math.nan
