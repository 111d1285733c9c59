"""What this machine offers a process: cores and memory, as the scheduler and the control group grant them."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def usable_cores() -> int:
    """Cores that this process may keep busy: its affinity, capped by the control group's CPU quota. At least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(affinity, _cpu_quota())))


def available_memory() -> int:
    """Bytes that can still be allocated without swapping: the kernel's estimate, capped by the control group."""
    return max(0, int(min(_meminfo_available(), _cgroup_headroom())))


def _cpu_quota() -> float:
    """Cores granted by the control group (v2 `cpu.max`, v1 `cpu.cfs_*`); infinite where there is no limit."""
    match _read(CGROUP / "cpu.max").split():
        case [quota, period] if quota != "max":
            return int(quota) / int(period)
    quota, period = _read(CGROUP / "cpu/cpu.cfs_quota_us"), _read(CGROUP / "cpu/cpu.cfs_period_us")
    if quota and period and int(quota) > 0:
        return int(quota) / int(period)
    return math.inf


def _meminfo_available() -> int:
    for line in _read(MEMINFO).splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_headroom() -> float:
    """Bytes below the control group's memory limit (v2, then v1); page cache counts as free, as it can be dropped."""
    for limit_file, usage_file, cache_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, usage = _read(CGROUP / limit_file), _read(CGROUP / usage_file)
        if limit.isdigit() and usage.isdigit():
            stat = dict(line.split() for line in _read((CGROUP / usage_file).with_name("memory.stat")).splitlines())
            return int(limit) - int(usage) + int(stat.get(cache_key, 0))
    return math.inf


def _read(path: Path) -> str:
    """The file's text without surrounding blanks; empty where there is no such file, as on another system."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
