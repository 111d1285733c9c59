"""python -m router.engine FD: serve the peer on the inherited socket FD."""

from __future__ import annotations

import logging
import signal
import socket
import sys


def main() -> None:
    """Ctrl-C in a terminal reaches the whole group; the API decides what it means, and closes the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from router.engine.loop import serve  # takes seconds, in which Ctrl-C may come

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        serve(sock)


if __name__ == "__main__":
    main()
