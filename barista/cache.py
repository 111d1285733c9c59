"""The cache folder: what was carved, pulled or packed once. Its entries appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from barista.errors import CacheError

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
MOVE_CACHE = "Free some space, or set BARISTA_CACHE to a folder on another disk."


def cache_root() -> Path:
    """`BARISTA_CACHE`, or `~/.cache/barista`. Not created."""
    chosen = os.environ.get("BARISTA_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else Path.home() / ".cache" / "barista"


def require_space(folder: Path, needed: int) -> None:
    """Raise CacheError unless `needed` bytes are free where `folder` is, or would be."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CacheError(f"{folder} needs {size(needed)} and its disk has {size(free)} free.", MOVE_CACHE)


@contextlib.contextmanager
def new_directory(
    final: Path, needed: int, *, resume: bool = False, usable: Callable[[Path], bool] = lambda folder: True
) -> Iterator[Path | None]:
    """Make the folder `final` as one step: yields a folder beside it to fill, which then takes its name.

    Yields None where `final` is there already, also when another process made it while this one waited for the lock.
    If the body raises or the process dies, `final` does not appear. What was written is thrown away, now or by the next
    try; with `resume` the next try finds it.
    needed: bytes of all that the folder will hold. usable: asked whether a folder that is there will do; one that will
    not is removed. Raises CacheError when the bytes do not fit or the cache is not writable.
    """
    with _locked(final):
        partial = final.with_name(f".{final.name}.partial")
        if final.exists() and usable(final):
            yield None
            return
        try:
            if final.exists():
                shutil.rmtree(final)  # whoever has mapped its files keeps them
            if not resume:
                shutil.rmtree(partial, ignore_errors=True)
            require_space(final, needed - _bytes_in(partial))
            partial.mkdir(exist_ok=True)
            yield partial
            partial.rename(final)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            raise CacheError(f"cannot write {final}: {error.strerror}.", MOVE_CACHE) from error
        finally:
            if not resume:
                shutil.rmtree(partial, ignore_errors=True)


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*")) if folder.exists() else 0


@contextlib.contextmanager
def _locked(final: Path) -> Iterator[None]:
    """Hold the lock of one entry; it is the process's, so that a killed one never leaves it behind."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = final.with_name(f".{final.name}.lock").open("w")
    except OSError as error:
        raise CacheError(f"cannot write {final.parent}: {error.strerror}.", MOVE_CACHE) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def size(num_bytes: float) -> str:
    """A size for people: 98362432 -> '98.4 MB'. Decimal units, as disks and the hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
