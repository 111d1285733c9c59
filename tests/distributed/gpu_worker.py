"""python -m tests.distributed.gpu_worker: a real worker, whose driver is the file tests/golden/nvml_h100_healthy.json.

Flags as experts.worker has them; --gpu 0 is one of the two GPUs of the file. Lines in the file that EVENTS_VARIABLE
names happen at the next look, once each: "xid N", "lose", or "clocks BITS".
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

from experts.worker.__main__ import main
from tests.unit.fake_nvml import FakeNvml

EVENTS_VARIABLE = "GPU_WORKER_EVENTS"


class ScriptedNvml(FakeNvml):
    """What a test writes comes true when somebody looks."""

    def __init__(self) -> None:
        super().__init__("h100_healthy")
        self._script = Path(os.environ[EVENTS_VARIABLE])
        self._done = 0

    def nvmlEventSetWait_v2(self, events: object, milliseconds: int) -> SimpleNamespace:
        lines = self._script.read_text().splitlines()
        for line in lines[self._done :]:
            match line.split():
                case ["xid", number]:
                    self.report_xid(int(number))
                case ["lose"]:
                    self.lose()
                case ["clocks", bits]:
                    self.change("nvmlDeviceGetCurrentClocksEventReasons", int(bits))
        self._done = len(lines)
        return super().nvmlEventSetWait_v2(events, milliseconds)


if __name__ == "__main__":
    main(ScriptedNvml())
