"""The limit of a step is the sum over its parts of the longer of reading and multiplying."""

from __future__ import annotations

import pytest
import torch

from benchmarks import limit
from benchmarks.engine import STRETCH, Stretch, least_seconds
from benchmarks.limit import Part, step_seconds


def test_each_part_takes_the_longer_of_its_two_times(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {("int4", 1): 10.0, ("int4", 4): 40.0, ("", 1): 5.0}
    monkeypatch.setattr(limit, "kernel_rate", lambda kind, dtype, rows: rates[kind, rows])
    read = Part(nbytes=100, multiply_adds=10, rows=1, kind="int4")  # 10 s to read, 1 s to multiply
    multiplied = Part(nbytes=10, multiply_adds=400, rows=7, kind="int4")  # 1 s, and 10 s at the rate of 4 rows
    alone = Part(nbytes=20)  # 2 s, nothing to multiply
    assert step_seconds([read, multiplied, alone], 10.0, torch.bfloat16) == 10 + 10 + 2


def test_a_kernel_has_a_rate_in_every_format() -> None:
    for kind in ("", "fp8", "int8", "int4", "mxfp4"):
        assert limit.kernel_rate(kind, torch.bfloat16, 2) > 0


def test_every_step_is_held_against_the_bandwidth_of_its_own_stretch() -> None:
    steps = [[Part(nbytes=100)]] * STRETCH + [[Part(nbytes=300)]] * STRETCH
    stretches = [Stretch(seconds=1.0, bandwidth=10.0), Stretch(seconds=1.0, bandwidth=20.0)]
    assert least_seconds(steps, stretches, torch.bfloat16) == STRETCH * (100 / 10 + 300 / 20)
