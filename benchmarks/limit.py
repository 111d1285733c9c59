"""The shortest time that a decode step can take here: the sum over its parts of the longer of two times, its bytes at
the memory's bandwidth and its multiply-adds at the rate at which our own kernel does them from the cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from experts import kernels
from experts.formats import FP8, QUANTISED

ROWS = (1, 2, 4, 8, 16)
SHAPE = (2048, 2048)  # in the cache, together with the rows
SECONDS = 0.03


@dataclass(frozen=True, slots=True)
class Part:
    """What a step reads once and multiplies with so many rows. kind: a name of QUANTISED, or "" for a plain matrix."""

    nbytes: int
    multiply_adds: int = 0
    rows: int = 1
    kind: str = ""


def step_seconds(parts: Sequence[Part], bandwidth: float, dtype: torch.dtype) -> float:
    """bandwidth: bytes a second; dtype: of rows and plain matrices."""
    return sum(max(part.nbytes / bandwidth, part.multiply_adds / _rate(part, dtype)) for part in parts)


def _rate(part: Part, dtype: torch.dtype) -> float:
    """That of the nearest number of rows that is no larger."""
    return kernel_rate(part.kind, dtype, max(count for count in ROWS if count <= part.rows))


@cache
def kernel_rate(kind: str, dtype: torch.dtype, rows: int) -> float:
    """Multiply-adds a second of a linear layer whose weight is in the cache: the best of many calls."""
    weight, x = _weight(kind, dtype), torch.randn(rows, SHAPE[1]).to(dtype)
    best, until = float("inf"), time.perf_counter() + SECONDS
    while (started := time.perf_counter()) < until:
        kernels.linear(x, weight)
        best = min(best, time.perf_counter() - started)
    return SHAPE[0] * SHAPE[1] * rows / best


def _weight(kind: str, dtype: torch.dtype) -> kernels.Weight:
    plain = torch.randn(SHAPE).to(dtype)
    if not kind:
        return plain
    if (form := QUANTISED[kind]) is FP8:
        return kernels.Fp8Weight(*kernels.encode_fp8(plain))
    return kernels.TiledWeight(form, SHAPE, kernels.encode(form, plain))
