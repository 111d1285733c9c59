"""A server in a thread of an actor's process. The process does not outlive it, so that Ray starts another one."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger(__name__)


class ServingThread:
    """Runs `main` in an event loop of its own; constructed when `main` has called what it is given: it serves.

    A `main` that fails before raises its error here, where a person is told. One that ends afterwards, however it ends,
    ends the process by `end_process`. restarted: nobody waits for this start, so that its failure is one of these, too:
    Ray tries an actor again whose process has died, and never one whose constructor has raised.
    """

    def __init__(
        self,
        main: Callable[[Callable[[], None]], Coroutine[Any, Any, None]],
        *,
        restarted: bool,
        end_process: Callable[[int], object] = os._exit,
    ) -> None:
        self.loop = asyncio.new_event_loop()
        self._main = main
        self._end_process = end_process
        self._must_end = restarted
        self._failure: BaseException | None = None
        self._settled = threading.Event()
        threading.Thread(target=self._run, name="controller", daemon=True).start()
        self._settled.wait()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            asyncio.set_event_loop(self.loop)
            self.loop.run_until_complete(self._main(self._serves))
            log.error("The controller has ended.")
        except BaseException as error:  # of any kind: the constructor raises it
            log.exception("The controller has failed.")
            self._failure = error
        finally:
            self.loop.close()
            if self._must_end:
                self._end_process(1)
            self._settled.set()

    def _serves(self) -> None:
        self._must_end = True
        self._settled.set()
