"""The engine's children: workers that take orders and answer in lines of JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from barista.errors import BaristaError
from experts.expert_model import ExpertModel

STOP_SECONDS = 5.0

log = logging.getLogger(__name__)


class WorkerLost(Exception):
    """A worker has gone, or has not answered in time. Its text says which and how."""


class WorkerRefused(BaristaError):
    """A worker cannot do what it was told to; it waits for the next order."""


class WorkerProcess:
    """One worker, from its start until `end`. name: worker-0. on_death: called, from a thread, when it has ended."""

    def __init__(self, name: str, model: ExpertModel, threads: int, on_death: Callable[[], None]) -> None:
        self.name = name
        command = [sys.executable, "-m", "experts.expert_parallel.worker", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._unread = b""
        self._ending = False
        self._watch = threading.Thread(target=self._wait, args=(on_death,), name=f"watch-{name}", daemon=True)
        self._watch.start()
        with contextlib.suppress(WorkerLost):  # which is found out when it does not answer
            self.tell(json.loads(model.to_json()))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs; a hung one does."""
        return self._process.poll() is None

    def tell(self, order: dict[str, Any]) -> None:
        """Give an order that has no answer. Raises WorkerLost."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise WorkerLost(f"{self.name} has gone (exit status {self._process.poll()})") from error

    def answer(self, order: str, deadline: float) -> dict[str, Any]:
        """Its answer to an order, before time.monotonic() is `deadline`. Raises WorkerLost and WorkerRefused.

        What it has said of earlier orders, such as why a step failed, goes to the log.
        """
        while (answer := self._line(deadline))["do"] != order:
            log.warning("%s: %s", self.name, answer.get("error", answer))
        if "error" in answer:
            raise WorkerRefused(f"{self.name}: {answer['error']}", answer["remedy"])
        return answer

    def _line(self, deadline: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            left = max(0.0, deadline - time.monotonic())  # it may have answered while another one was waited for
            if not select.select([descriptor], [], [], left)[0]:
                raise WorkerLost(f"{self.name} has not answered in time")
            read = os.read(descriptor, 1 << 16)
            if not read:
                raise WorkerLost(f"{self.name} has gone (exit status {self._process.wait()})")
            self._unread += read
        line, self._unread = self._unread.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self, *, now: bool = False) -> None:
        """Let it go, and wait until it has; now: at once, because it does not answer. Idempotent."""
        self._ending = True
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if now:
            self._process.kill()
        with contextlib.suppress(OSError):  # it had gone with an order unread
            self._process.stdin.close()
        if not self._has_ended():
            self._process.kill()
            if not self._has_ended():  # its GPU's driver keeps it
                log.warning("%s (process %d) cannot be ended, and is left behind.", self.name, self.pid)
        self._process.stdout.close()
        self._watch.join(STOP_SECONDS)

    def _has_ended(self) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        return not self.alive

    def _wait(self, on_death: Callable[[], None]) -> None:
        self._process.wait()
        if not self._ending:
            on_death()
