"""Looks at a process's GPUs now and then, and remembers what must not be forgotten."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experts.health.nvml import Nvml, open_nvml
from experts.health.reading import GpuHealth
from experts.health.verdict import HEALTHY, Condition, Verdict, judge, worst

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
CLOSE_SECONDS = 1.0
COOLED_SECONDS = 30.0  # without a slowdown, until a GPU counts as cool: clocks near the limit go up and down


@dataclass(frozen=True, slots=True)
class Report:
    """verdict: of all GPUs together. gpus: the newest readings. xids: since the start, how often each, by UUID."""

    verdict: Verdict = HEALTHY
    gpus: tuple[GpuHealth, ...] = ()
    xids: Mapping[str, Mapping[int, int]] = field(default_factory=dict)


class Record:
    """What follows from the readings of one process, as they come.

    A fatal verdict stays: what was computed since cannot be trusted, and only a new process asks anew. A slowdown stays
    until there has been none for COOLED_SECONDS. now: seconds of one clock.
    """

    def __init__(self) -> None:
        self._before: dict[str, GpuHealth] = {}
        self._slow: dict[str, tuple[float, Verdict]] = {}  # since when it is the last
        self._fatal: Verdict | None = None
        self._xids: dict[str, Counter[int]] = {}

    def observe(self, gpus: Sequence[GpuHealth], now: float) -> Report:
        """One look at all of them."""
        verdicts = [self._judge(gpu, now) for gpu in gpus]
        if self._fatal is None and worst(verdicts).condition is Condition.FATAL:
            self._fatal = worst(verdicts)
        xids = {uuid: dict(counts) for uuid, counts in self._xids.items()}
        return Report(self._fatal or worst(verdicts), tuple(gpus), xids)

    def _judge(self, gpu: GpuHealth, now: float) -> Verdict:
        verdict = judge(self._before.get(gpu.uuid), gpu)
        self._before[gpu.uuid] = gpu
        if gpu.xids is not None:
            self._xids.setdefault(gpu.uuid, Counter()).update(gpu.xids)
        if verdict.condition is Condition.THERMAL:
            self._slow[gpu.uuid] = now, verdict
        last, slow = self._slow.get(gpu.uuid, (now, HEALTHY))
        return slow if verdict.condition is Condition.HEALTHY and now - last < COOLED_SECONDS else verdict


class GpuWatch:
    """Looks every two seconds in a thread of its own, because a driver in trouble may keep a caller waiting.

    The first look is taken at once. `report` never waits. Closes `nvml` when it is closed itself.
    """

    def __init__(
        self, nvml: Nvml, clock: Callable[[], float] = time.monotonic, look_seconds: float = LOOK_SECONDS
    ) -> None:
        self._nvml = nvml
        self._clock = clock
        self._look_seconds = look_seconds
        self._record = Record()
        self._closed = threading.Event()
        self.report = Report()
        self.look()
        self._thread = threading.Thread(target=self._keep_looking, name="gpu-watch", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """One look, as the thread takes them."""
        before = self.report.verdict
        try:
            self.report = self._record.observe(self._nvml.read(), self._clock())
        except Exception:  # the next look may be better
            log.exception("The GPUs could not be looked at.")
        self._tell(before)

    def close(self) -> None:
        """End the looks. A thread that the driver keeps is left behind. Idempotent."""
        self._closed.set()
        self._thread.join(CLOSE_SECONDS)

    def _keep_looking(self) -> None:
        while not self._closed.wait(self._look_seconds):
            self.look()
        self._nvml.close()

    def _tell(self, before: Verdict) -> None:
        verdict = self.report.verdict
        if verdict.condition is not before.condition:
            level = logging.INFO if verdict.condition is Condition.HEALTHY else logging.WARNING
            log.log(level, "The GPUs are %s. %s", verdict.condition.name.lower(), verdict.reason)


def watch_gpus(gpus: Sequence[str], nvml: Any = None) -> GpuWatch | None:
    """A watch over these, None where there is no driver of NVIDIA. Arguments and errors: as of `open_nvml`."""
    opened = open_nvml(gpus, nvml)
    return None if opened is None else GpuWatch(opened)
