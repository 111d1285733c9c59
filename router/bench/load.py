"""Who sends requests when: an open loop, whose users come whether or not the server keeps up, or a closed one."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from router.bench.arrivals import arrivals

RETRY_SECONDS = 0.1  # so that a closed loop does not hammer a server that refuses or is gone

# The request's number from 0, and when on the clock its user came -> whether it was answered.
Ask = Callable[[int, float], Awaitable[bool]]  # raises nothing
Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is sent: an open loop if there is a rate, else a closed one.

    rate: requests a second. concurrency: the closed loop's users; None: one. duration: seconds in which requests are
    sent; those under way are waited for. num_prompts: at most so many. max_in_flight: so many of an open loop at once;
    what arrives meanwhile waits, and the wait is part of its latency. seed: of arrivals and prompts.
    """

    rate: float | None
    concurrency: int | None
    duration: float
    num_prompts: int | None
    max_in_flight: int
    seed: int


async def run(load: Load, ask: Ask, clock: Clock = time.perf_counter) -> None:
    """Send the load and wait until every request has its record."""
    if load.rate is None:
        await closed_loop(load.concurrency or 1, load.duration, load.num_prompts, ask, clock)
    else:
        times = arrivals(load.rate, load.duration, load.seed)
        await open_loop(itertools.islice(times, load.num_prompts), load.max_in_flight, ask, clock)


async def open_loop(times: Iterator[float], max_in_flight: int, ask: Ask, clock: Clock) -> None:
    """Ask at each of the times, in seconds from now."""
    began = clock()
    free = asyncio.Semaphore(max_in_flight)

    async def one(index: int, start: float) -> None:
        await ask(index, start)
        free.release()

    async with asyncio.TaskGroup() as group:
        for index, arrival in enumerate(times):
            await asyncio.sleep(began + arrival - clock())
            await free.acquire()
            group.create_task(one(index, began + arrival))


async def closed_loop(concurrency: int, duration: float, num_prompts: int | None, ask: Ask, clock: Clock) -> None:
    """`concurrency` users, each of whom asks again as soon as the answer is there."""
    end = clock() + duration
    indices = iter(range(num_prompts)) if num_prompts is not None else itertools.count()

    async def user() -> None:
        while (start := clock()) < end and (index := next(indices, None)) is not None:
            if not await ask(index, start):
                await asyncio.sleep(RETRY_SECONDS)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(user())
