"""How fast this machine's memory can be read, with as many threads as the kernels use."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch

BLOCK = 2**28  # bytes for each thread, far more than the caches hold


class MemoryReader:
    """Sums BLOCK bytes in each of so many threads. A context: its memory and its threads last as long."""

    def __init__(self, threads: int) -> None:
        self._blocks = [torch.ones(BLOCK // 4) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def read(self) -> float:
        """Bytes a second of reading all of it once, now."""
        started = time.perf_counter()
        list(self._pool.map(torch.sum, self._blocks))
        return len(self._blocks) * BLOCK / (time.perf_counter() - started)


def read_bandwidth(threads: int, repeats: int = 9) -> float:
    """Bytes a second: the median of some repeats."""
    with MemoryReader(threads) as reader:
        return statistics.median(reader.read() for _ in range(repeats))
