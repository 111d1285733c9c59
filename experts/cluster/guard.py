"""python -m experts.cluster.guard MARK: when standard input ends, kill every process that carries MARK.

Ray's own processes die with the process that started them, but for its agents, which outlive a killed raylet by a
minute. The keeper of a local cluster puts the mark into its environment, which all of Ray's processes inherit, and holds
the other end of the pipe: it ends however the keeper ends.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

VARIABLE = "BARISTA_CLUSTER_MARK"
ROUNDS = 20
QUIET_ROUNDS = 3  # a process that is being started while its siblings are killed is found in a later round
ROUND_SECONDS = 0.1


def main() -> None:
    """Wait for the end, then kill."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    mark = f"{VARIABLE}={sys.argv[1]}".encode()
    sys.stdin.buffer.read()
    quiet = 0
    for _ in range(ROUNDS):
        pids = marked(mark)
        quiet = 0 if pids else quiet + 1
        if quiet == QUIET_ROUNDS:
            return
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(ROUND_SECONDS)


def marked(mark: bytes) -> list[int]:
    """The processes with VARIABLE=value in the environment that they were started with, this one aside."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:  # it has gone, or it is another user's
            continue
        if mark in environment.split(b"\0") and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


if __name__ == "__main__":
    main()
