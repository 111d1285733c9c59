"""The pages of a mapped file: read before they are needed, and given back to the system. Torch-free."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from experts.checkpoint import TensorInfo

_LINUX_DEFAULT = 128 << 10


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes start to end of a file, whole pages."""

    file: Path
    start: int
    end: int


def spans_of(infos: Iterable[TensorInfo]) -> tuple[Span, ...]:
    """The pages in which these tensors lie, those of neighbours joined.

    A packed expert is one span and shares no page with another. In a checkpoint, the pages at its edges may be shared.
    """
    spans: list[Span] = []
    for info in sorted(infos, key=lambda info: (info.file, info.offset)):
        start = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
        end = -(-(info.offset + info.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        if spans and spans[-1].file == info.file and start <= spans[-1].end:
            start = spans.pop().start
        spans.append(Span(info.file, start, end))
    return tuple(spans)


def read_ahead(mapped: mmap.mmap, span: Span) -> None:
    """Have the system read a span of a mapped file into its cache, where it can, without waiting for it."""
    if not hasattr(mmap, "MADV_WILLNEED"):
        return
    step = _read_ahead_bytes(span.file)
    for start in range(span.start, span.end, step):
        mapped.madvise(mmap.MADV_WILLNEED, start, min(step, span.end - start))


def give_back(mapped: mmap.mmap, span: Span) -> None:
    """Free a span's memory: its part of the mapping, to which nothing was written, then of the system's cache.

    The mapping stays valid: who reads it again waits for the disk. Pages that another process has mapped stay cached.
    """
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED, span.start, span.end - span.start)
    if hasattr(os, "posix_fadvise"):
        with span.file.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), span.start, span.end - span.start, os.POSIX_FADV_DONTNEED)


@cache
def _read_ahead_bytes(file: Path) -> int:
    """What Linux reads of a file at most when it is told that more will be needed; it forgets the rest."""
    device = file.stat().st_dev
    try:
        kilobytes = int(Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text())
    except (OSError, ValueError):
        return _LINUX_DEFAULT
    return max(kilobytes << 10, _LINUX_DEFAULT) // mmap.PAGESIZE * mmap.PAGESIZE
