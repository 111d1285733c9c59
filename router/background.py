"""A server of one's own, for as long as a command runs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

from barista.errors import BaristaError

STOP_SECONDS = 10
# What could make the server ask for a key, which nobody but this process needs: a configuration file may name some.
KEY_SETTINGS = ("BARISTA_API_KEY_FILE", "BARISTA_ADMIN_KEY_FILE", "BARISTA_CONFIG")


@contextlib.contextmanager
def background_server(model: str) -> Iterator[str]:
    """Serve `model` on a free port of loopback until the block ends. Yields the address, without a path.

    The server lives in its own session, so that Ctrl-C here does not reach it, and watches its standard input, so that
    it ends with this process however that ends. Raises BaristaError if it does not start; it has said why on stderr.
    """
    flags = ["--host", "127.0.0.1", "--port", "0", "--log-level", "warning", "--json", "--until-eof"]
    process = subprocess.Popen(
        [sys.executable, "-m", "router.cli", "serve", model, *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name not in KEY_SETTINGS},
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        ready = process.stdout.readline()
        if not ready:
            raise BaristaError(f"{model} cannot be served (exit status {process.wait()}).", "The lines above say why.")
        yield json.loads(ready)["url"]
    finally:
        process.stdin.close()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
