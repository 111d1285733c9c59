"""Which product computes a layer's experts, for how many rows: what was fastest, once for each machine.

The choice is by the number of rows that a call brings, never by values, so that a CUDA graph keeps it. Products differ
in the last bits. So a choice holds for all layers whose experts have one shape, however many of them lie here: when
experts move, and on every GPU of its name that shares the cache, rows have the bytes that they had before.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from barista.cache import cache_root, new_directory
from barista.errors import CacheError

log = logging.getLogger(__name__)

_FILE, _ENTRY_BYTES = "choice.json", 1 << 12
MARGIN = 0.05  # of the time: what another product must save, so that noise changes none

Timings = Mapping[str, Mapping[int, float]]  # name of a product -> number of rows -> seconds; what failed is missing


@dataclass(frozen=True, slots=True)
class Case:
    """What timings hold for. device: its name. torch, triton: versions. hidden, intermediate: of one expert. weights,
    rows: dtypes.
    """

    device: str
    torch: str
    triton: str
    hidden: int
    intermediate: int
    weights: str
    rows: str


@dataclass(frozen=True, slots=True)
class Choice:
    """names[i] computes up to bounds[i] rows, and more than bounds[i - 1]; the last one has no bound.

    bounds: ascending, one less than names.
    """

    names: tuple[str, ...]
    bounds: tuple[int, ...] = ()

    def name(self, num_rows: int) -> str:
        """The product for so many rows."""
        return self.names[sum(num_rows > bound for bound in self.bounds)]


def choose(timings: Timings) -> Choice | None:
    """From fewest rows to most, keep to one product until another is faster by MARGIN. None where nothing was timed.

    A count of rows that was timed stands for those from its half-way point to the one before, as ratios go.
    """
    names: list[str] = []
    bounds: list[int] = []
    last = 0
    for count in sorted({count for times in timings.values() for count in times}):
        times = {name: at[count] for name, at in timings.items() if count in at}
        best = min(times, key=lambda name: times[name])
        if not names:
            names.append(best)
        elif names[-1] not in times or times[best] < (1 - MARGIN) * times[names[-1]]:
            names.append(best)
            bounds.append(round((last * count) ** 0.5))
        last = count
    return Choice(tuple(names), tuple(bounds)) if names else None


def kept_choice(
    case: Case, works: Callable[[str], bool], measure: Callable[[], Timings], root: Path | None = None
) -> Choice | None:
    """The choice of this case, measured if this machine has none, or one with a product that does not work here.

    While one process measures, others that ask for the same wait and take what it finds. A cache that cannot be written
    is no error. None where measuring times nothing. root: of the cache.
    """
    digest = hashlib.blake2b(repr(astuple(case)).encode(), digest_size=8).hexdigest()
    entry = (root or cache_root()) / "products" / digest

    def usable(folder: Path) -> bool:
        choice = _read(folder)
        return choice is not None and all(map(works, choice.names))

    timings: Timings | None = None
    try:
        with new_directory(entry, _ENTRY_BYTES, usable=usable) as folder:
            if folder is None:
                return _read(entry)
            timings = measure()
            _write(folder, case, timings)
    except CacheError as error:
        log.info("the choice of a product for experts is not kept: %s", error)
    return choose(measure() if timings is None else timings)


def _write(folder: Path, case: Case, timings: Timings) -> None:
    """The seconds are for people to read."""
    choice = choose(timings)
    value = {"choice": choice and asdict(choice), "case": asdict(case), "seconds": timings}
    (folder / _FILE).write_text(json.dumps(value, indent=1))


def _read(folder: Path) -> Choice | None:
    """None where there is no choice, or nothing that can be read."""
    try:
        value = json.loads((folder / _FILE).read_text())["choice"]
        choice = Choice(tuple(map(str, value["names"])), tuple(map(int, value["bounds"])))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return choice if len(choice.names) == len(choice.bounds) + 1 else None
