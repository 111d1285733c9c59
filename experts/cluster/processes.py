"""What Linux offers to keep a family of processes together."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """Orphans among this process's descendants become its children: prctl(2), PR_SET_CHILD_SUBREAPER."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(parent: int) -> None:
    """Get SIGTERM when the parent dies, also if it has died before this call: prctl(2), PR_SET_PDEATHSIG."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def children(parent: int) -> list[int]:
    """The processes whose parent is `parent`; those that have ended and were not waited for, too."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except OSError:  # it has gone
            continue
        # proc(5): pid (name) state ppid ...; the name may hold anything, so count from its last bracket.
        if int(stat.rpartition(")")[2].split()[1]) == parent:
            found.append(int(folder.name))
    return found


def _prctl(option: int, argument: int) -> None:
    if hasattr(ctypes.CDLL(None), "prctl"):  # Linux alone
        ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0)
