"""A recording of NVML's answers repeats them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experts.health.nvml import Nvml
from experts.health.nvml_topology import read_topology
from tests.gpu.record_nvml import record
from tests.unit import fake_nvml
from tests.unit.fake_nvml import GOLDEN, FakeNvml

FILES = sorted(file.stem.removeprefix("nvml_") for file in GOLDEN.glob("nvml_*.json"))


@pytest.mark.parametrize("name", FILES)
def test_what_was_recorded_is_read_as_it_was(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvml_again.json").write_text(json.dumps(record(FakeNvml(name), "again")))
    first = Nvml(FakeNvml(name))
    monkeypatch.setattr(fake_nvml, "GOLDEN", tmp_path)
    again = Nvml(FakeNvml("again"))
    assert [replace(gpu, xids=None) for gpu in again.read()] == [replace(gpu, xids=None) for gpu in first.read()]
    assert read_topology(again) == read_topology(first)
