"""How fast this machine's memory can be read, with as many threads as the kernels use."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import torch

BLOCK = 2**28  # bytes for each thread, far more than the caches hold


def read_bandwidth(threads: int, repeats: int = 9) -> float:
    """Bytes a second of summing BLOCK bytes in each of so many threads: the median of some repeats."""
    blocks = [torch.ones(BLOCK // 4) for _ in range(threads)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # each of our threads sums its own block
    try:
        with ThreadPoolExecutor(threads) as pool:
            seconds = []
            for _ in range(repeats):
                started = time.perf_counter()
                list(pool.map(torch.sum, blocks))
                seconds.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return threads * BLOCK / statistics.median(seconds)
