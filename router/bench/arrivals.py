"""When the requests of an open loop come."""

from __future__ import annotations

import random
from collections.abc import Iterator


def arrivals(rate: float, duration: float, seed: int) -> Iterator[float]:
    """The arrivals of a Poisson process: seconds from the start, ascending, all before `duration`.

    rate: mean arrivals a second; duration: seconds; both positive and finite. The gaps between arrivals are
    independent and exponential with mean 1 / rate, so a longer run begins as a shorter one of the same seed.
    """
    draw = random.Random(seed)
    time = draw.expovariate(rate)
    while time < duration:
        yield time
        time += draw.expovariate(rate)
