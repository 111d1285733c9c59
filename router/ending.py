"""What ends a process that serves, and waiting for it: SIGINT and a second signal at once, SIGTERM after a drain."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from typing import Any


class Ending:
    """Two events of the running event loop. now: end at once. drain: take no more, and end when all is done."""

    def __init__(self) -> None:
        self.now = asyncio.Event()
        self.drain = asyncio.Event()

    def watch(self, *, until_eof: bool) -> None:
        """Let signals set them, and (until_eof) the end of standard input."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self.now.set)
        loop.add_signal_handler(signal.SIGTERM, self._terminate)
        if until_eof:
            loop.add_reader(sys.stdin.fileno(), self._read_stdin)

    def _terminate(self) -> None:
        (self.now if self.drain.is_set() else self.drain).set()

    def _read_stdin(self) -> None:
        if not os.read(sys.stdin.fileno(), 1):
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self.now.set()


async def first(*awaitables: Coroutine[Any, Any, Any] | asyncio.Task[Any], timeout: float | None = None) -> None:
    """Wait until one of them is done, or for `timeout` seconds.

    Tasks go on; coroutines are cancelled, and what one of them has raised is raised here.
    """
    own = [asyncio.create_task(item) for item in awaitables if not isinstance(item, asyncio.Task)]
    given = [item for item in awaitables if isinstance(item, asyncio.Task)]
    try:
        done, _ = await asyncio.wait([*own, *given], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in own:
            task.cancel()
    for task in done.intersection(own):
        task.result()
