"""Is a worker well, as its own answers show it: how long to wait for it, when to ask another, when to use it again.

Liveness is progress, not an open port: a hung process keeps its connections. Nothing here reads a clock or a socket.
Times are seconds of one monotonic clock; work is in the units of `work_of`.
"""

from __future__ import annotations

from collections import deque

LEAST_DEADLINE = 0.05
DEADLINE_FACTOR = 8.0
LEAST_HEDGE = 0.008
HEDGE_FACTOR = 3.0
# Until a worker has answered so often nothing is known of it, and its first answers may wait for pages of the disk.
WARM_ANSWERS = 24
COLD_DEADLINE = 1.0
COLD_HEDGE = 0.1

# A straggler takes so many times as long as the others for the same work, so many times in a row; below the floor
# nobody waits long enough to care.
STRAGGLER_FACTOR = 4.0
STRAGGLER_STREAK = 4
STRAGGLER_FLOOR = 0.005

FIRST_QUARANTINE = 1.0
LONGEST_QUARANTINE = 30.0
# A worker that has been well for so long starts again with the first quarantine.
FORGIVEN_AFTER = 60.0

HEDGE_SHARE = 0.05
HEDGE_BURST = 8.0

EXPERT_COST = 4  # what reading an expert's weights costs, in rows

_WINDOW = 128
_REFRESH = 16


def work_of(num_experts: int, num_pairs: int) -> int:
    """How much work a request is: reading an expert's weights costs as much as a few rows, a message as some more."""
    return 16 + EXPERT_COST * num_experts + num_pairs


class Liveness:
    """One worker's health."""

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=_WINDOW)  # seconds a unit of work, of recent answers
        self._answers = 0  # since the last quarantine
        self._answers_ever = 0
        self._p99 = 0.0
        self.median = 0.0
        self._streak = 0
        self._quarantine = FIRST_QUARANTINE
        self._suspect_until: float | None = None
        self._well_since = 0.0

    def answered(
        self, now: float, seconds: float, work: int, others: float = 0.0, at_least: float | None = None
    ) -> None:
        """An answer was found after `seconds`. others: the median rate of the other workers, 0 if unknown.

        at_least: how long it took for certain, if that is less: it may have been there while another one was waited
        for, and then the time that this took is not held against it.
        """
        slow_after = max(STRAGGLER_FLOOR, STRAGGLER_FACTOR * others * work)
        slow = others > 0 and seconds > slow_after
        if slow and at_least is not None:
            if at_least <= slow_after:
                return
            seconds = at_least
        self._rates.append(seconds / work)
        self._answers += 1
        self._answers_ever += 1
        if self._answers % _REFRESH == 0 or self._answers == 1:
            ordered = sorted(self._rates)
            self._p99 = ordered[int(0.99 * (len(ordered) - 1))]
            self.median = ordered[len(ordered) // 2]
        if slow:
            self._streak += 1
            if self._streak >= STRAGGLER_STREAK:
                self.quarantine(now)
        else:
            self._streak = 0

    def quarantine(self, now: float) -> None:
        """It was late, too slow or wrong: leave it alone for a while, twice as long each time."""
        until = self._suspect_until
        if until is not None and now < until:
            return
        if now - self._well_since > FORGIVEN_AFTER:
            self._quarantine = FIRST_QUARANTINE
        self._suspect_until = now + self._quarantine
        self._well_since = self._suspect_until
        self._quarantine = min(2 * self._quarantine, LONGEST_QUARANTINE)
        self._streak = 0
        self._rates.clear()  # what it did while it was ill says nothing of how it does when it is well
        self._answers = 0

    @property
    def quarantined(self) -> bool:
        """Whether a quarantine has begun that nobody has seen the end of."""
        return self._suspect_until is not None

    def suspect(self, now: float, outstanding: int) -> bool:
        """True while it is quarantined: for its time, and for as long as it owes an answer from before. May be asked
        from any thread."""
        until = self._suspect_until
        if until is None:
            return False
        if now < until or outstanding > 0:
            return True
        self._suspect_until = None
        self._well_since = now
        return False

    @property
    def cold(self) -> bool:
        """It has answered too seldom for a guess at how long it takes."""
        return self._answers < WARM_ANSWERS

    @property
    def new(self) -> bool:
        """It has only just come: its deadline is long, and its hedges are few enough to be free."""
        return self._answers_ever < WARM_ANSWERS

    def deadline(self, work: int) -> float:
        """Seconds after which an answer is late: max(50 ms, 8 x p99 of its recent rates)."""
        known = max(LEAST_DEADLINE, DEADLINE_FACTOR * self._p99 * work)
        return max(known, COLD_DEADLINE) if self.cold else known

    def hedge_after(self, work: int) -> float:
        """Seconds after which another replica may be asked as well; never later than the deadline.

        While it is cold one slow answer says little, so its best one counts.
        """
        rate = min(self._rates, default=0.0) if self.cold else self._p99
        least = COLD_HEDGE if self.cold else LEAST_HEDGE
        return min(max(least, HEDGE_FACTOR * rate * work), self.deadline(work))


class HedgeBudget:
    """Hedges as a share of dispatches, with a small burst, so that a busy machine does not hedge itself to death."""

    def __init__(self, share: float = HEDGE_SHARE, burst: float = HEDGE_BURST) -> None:
        self._share = share
        self._burst = burst
        self._tokens = burst

    def dispatched(self) -> None:
        """One request was sent."""
        self._tokens = min(self._burst, self._tokens + self._share)

    def take(self) -> bool:
        """True if one hedge is allowed now; it is counted."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
