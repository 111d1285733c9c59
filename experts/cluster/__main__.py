"""python -m experts.cluster FD: keep a pool for the peer on the inherited socket FD, and leave no process behind.

The work is done by a child (experts.cluster.keeper). When it has ended, however it ended, whatever it left is killed:
Ray's processes follow the one that started them, but for its agents, which outlive a killed raylet by a minute. They
become children of this process, a subreaper. If this process is killed, the child is told so and ends in order.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from experts.cluster.environment import keeper_environment
from experts.cluster.processes import become_subreaper, children

REAP_SECONDS = 5.0
ROUND_SECONDS = 0.05


def main() -> int:
    """The child's exit status."""
    become_subreaper()
    fd = int(sys.argv[1])
    # A session of its own: what is sent to the group of the server must not end Ray's processes under the keeper.
    keeper = subprocess.Popen(
        [sys.executable, "-m", "experts.cluster.keeper", str(fd), str(os.getpid())],
        pass_fds=[fd],
        env=keeper_environment(os.environ),
        start_new_session=True,
    )
    os.close(fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: keeper.terminate())
    status = keeper.wait()
    kill_children()
    return status


def kill_children() -> None:
    """Until there is none: the children of a killed one become ours."""
    deadline = time.monotonic() + REAP_SECONDS
    while time.monotonic() < deadline:
        pids = children(os.getpid())
        if not pids:
            return
        for pid in pids:
            os.kill(pid, signal.SIGKILL)  # ours, and not waited for yet: the number cannot be another's
            os.waitpid(pid, os.WNOHANG)
        time.sleep(ROUND_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
