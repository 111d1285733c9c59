"""python fake_keeper.py STORY FD: the keeper's end of the protocol, without Ray. Writes what it was told to $ORDER."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

READY = {"event": "ready", "controller": "127.0.0.1:1", "token": "secret", "pool": "tests"}
FATAL = {"event": "fatal", "message": "The Ray cluster at 10.0.0.9:6379 does not answer.", "remedy": "Start one."}


def main(story: str, fd: int) -> None:
    with socket.socket(fileno=fd) as sock, sock.makefile("rw") as lines:

        def say(event: object) -> None:
            lines.write(json.dumps(event) + "\n")
            lines.flush()

        order = json.loads(lines.readline())
        if "ORDER" in os.environ:
            Path(os.environ["ORDER"]).write_text(json.dumps(order | {"sid": os.getsid(0), "pid": os.getpid()}))
        if story == "ends":
            sys.exit(3)
        say({"event": "progress", "fraction": 0.5, "message": "Ray"})
        if story == "fatal":
            say(FATAL)
            return
        if story == "hangs before ready":
            lines.readline()
            return
        say(READY)
        if story == "dies":
            return
        if story == "fatal later":
            say(FATAL)
            return
        say({"event": "progress", "fraction": 0.9, "message": "workers"})
        if story == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        lines.readline()  # until the parent has gone


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
