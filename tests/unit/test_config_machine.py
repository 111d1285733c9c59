"""What the machine grants, read from made-up control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from barista import machine


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 2000 kB\nMemAvailable:    1000 kB\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    return tmp_path


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1)])
def test_a_cpu_quota_caps_the_usable_cores(cgroup: Path, quota: str, cores: int) -> None:
    (cgroup / "cpu.max").write_text(quota)
    assert machine.usable_cores() == cores


def test_a_first_version_cpu_quota_caps_the_usable_cores(cgroup: Path) -> None:
    (cgroup / "cpu").mkdir()
    (cgroup / "cpu/cpu.cfs_quota_us").write_text("200000")
    (cgroup / "cpu/cpu.cfs_period_us").write_text("100000")
    assert machine.usable_cores() == 2


def test_without_limits_the_kernel_and_the_affinity_decide(cgroup: Path) -> None:
    assert machine.usable_cores() == 8
    assert machine.available_memory() == 1000 * 1024


def test_a_memory_limit_caps_what_is_available_and_page_cache_counts_as_free(cgroup: Path) -> None:
    (cgroup / "memory.max").write_text("500000")
    (cgroup / "memory.current").write_text("450000")
    (cgroup / "memory.stat").write_text("anon 100\ninactive_file 20000\n")
    assert machine.available_memory() == 70_000
