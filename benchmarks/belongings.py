"""What the processes of a server hold, so that a leak shows."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import psutil

ENGINE = "-m router.engine"
ACTORS = ("ray::ControllerActor", "ray::WorkerActor")  # as Ray titles their processes
# Threads and files that a process may have more of than before, because libraries start theirs as they come to need
# them. What leaks with every sixth fault of fifty shows.
SLACK = 8


def resident_bytes(server: psutil.Process) -> int:
    """Of the server and its engine."""
    total = server.memory_info().rss
    for process in server.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if ENGINE in " ".join(process.cmdline()):
                total += process.memory_info().rss
    return total


def belongings(server: psutil.Process, pool: dict[str, Any]) -> dict[str, int]:
    """What the processes of a server hold, by name: threads, open files, windows, and Ray's actors.

    Of the workers, which come and go, the most that any of them has.
    """
    processes: dict[str, list[psutil.Process]] = {"server": [server], "engine": [], "controller": [], "worker": []}
    pids = {worker["pid"] for worker in pool["workers"]}
    actors = 0
    for process in server.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            actors += title.startswith(ACTORS)
            if ENGINE in title:
                processes["engine"].append(process)
            elif title.startswith(ACTORS[0]):
                processes["controller"].append(process)
            elif process.pid in pids:
                processes["worker"].append(process)
    found = {"actors": actors, "segments": _segments(processes["engine"])}
    for name, group in processes.items():
        found[f"{name} threads"] = max((process.num_threads() for process in group), default=0)
        found[f"{name} files"] = max((process.num_fds() for process in group), default=0)
        found[f"{name} windows"] = max((_windows(process) for process in group), default=0)
    return found


def leaks(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """What there is more of than before. Actors, windows and segments are counted to the last one."""
    problems = []
    for name, count in after.items():
        slack = SLACK if name.endswith(("threads", "files")) else 0
        if count > before[name] + slack:
            problems.append(f"{name}: {before[name]} before the faults, {count} after")
    return problems


def _windows(process: psutil.Process) -> int:
    """Windows that a process has mapped, whether or not they still have a name."""
    lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    return len({line.partition("/dev/shm/")[2] for line in lines if "/dev/shm/barista-" in line})


def _segments(engines: list[psutil.Process]) -> int:
    """Windows of these engines that still have a name."""
    return sum(len(list(Path("/dev/shm").glob(f"barista-{engine.pid}-*"))) for engine in engines)
