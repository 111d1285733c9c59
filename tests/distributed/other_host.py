"""python -m tests.distributed.other_host: a worker on another host, as far as a network namespace can be one.

Flags as experts.worker has them. NAMESPACE_VARIABLE names the namespace, HOST_VARIABLE the address to listen on. The
process has a /dev/shm of its own.
"""

from __future__ import annotations

import os
import sys

NAMESPACE_VARIABLE, HOST_VARIABLE = "OTHER_HOST_NAMESPACE", "OTHER_HOST_ADDRESS"

if __name__ == "__main__":
    worker = [sys.executable, "-m", "experts.worker", "--host", os.environ[HOST_VARIABLE], *sys.argv[1:]]
    shell = ["sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
    inside = ["ip", "netns", "exec", os.environ[NAMESPACE_VARIABLE], "unshare", "--mount", "--propagation", "private"]
    os.execvp(inside[0], [*inside, *shell, *worker])
