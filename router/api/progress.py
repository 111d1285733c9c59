"""Whether an engine makes progress: a step may take long, but not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable

PROGRESS_SECONDS = 300.0


class Progress:
    """Told at each look whether the engine answers. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._silent_since: float | None = None

    def seen(self, answers: bool) -> bool:
        """False once it has answered at no look for PROGRESS_SECONDS."""
        if answers:
            self._silent_since = None
            return True
        if self._silent_since is None:
            self._silent_since = self._clock()
        return self._clock() - self._silent_since < PROGRESS_SECONDS
