"""The limit of a step is the sum over its parts of the longer of reading and multiplying."""

from __future__ import annotations

import pytest
import torch

from benchmarks import limit
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
