"""How fast this machine's memory can be read, with as many threads as the kernels use."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

BLOCK = 2**28  # bytes for each thread, far more than the caches hold


@contextlib.contextmanager
def memory_reader(threads: int) -> Iterator[Callable[[], float]]:
    """A function that sums BLOCK bytes in each of so many threads and returns how many bytes a second that was."""
    blocks = [torch.ones(BLOCK // 4) for _ in range(threads)]
    # Each thread sums its own block alone: torch counts threads for the thread that asks.
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def read() -> float:
            started = time.perf_counter()
            list(pool.map(torch.sum, blocks))
            return threads * BLOCK / (time.perf_counter() - started)

        yield read


def read_bandwidth(threads: int, repeats: int = 9) -> float:
    """Bytes a second: the median of some repeats."""
    with memory_reader(threads) as read:
        return statistics.median(read() for _ in range(repeats))
