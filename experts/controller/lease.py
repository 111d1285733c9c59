"""When a pool without a name has been abandoned."""

from __future__ import annotations

LEASE_SECONDS = 10.0


class Lease:
    """Held by a keeper that renews it, or by an engine that is attached. Times in seconds of one clock."""

    def __init__(self, now: float) -> None:
        self._held = now

    def renew(self, now: float) -> None:
        """Somebody needs the pool."""
        self._held = max(self._held, now)

    def is_over(self, now: float, *, engines: int) -> bool:
        """True when nobody has needed the pool for ten seconds."""
        if engines:
            self.renew(now)
        return now - self._held > LEASE_SECONDS
