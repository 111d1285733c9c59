"""python -m experts.cluster FD: keep a pool for the peer on the inherited socket FD."""

from __future__ import annotations

import logging
import os
import signal
import sys


def main() -> None:
    """Nothing but our own lines goes to standard error, and nothing at all to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    from experts.cluster.keeper import Keeper, inherited

    with inherited(int(sys.argv[1])) as sock:
        Keeper(sock).run()


if __name__ == "__main__":
    main()
