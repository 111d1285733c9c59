"""python -m tests.gpu.record_nvml ABOUT: what NVML answers here, as a file tests/golden/nvml_*.json has it.

Every call that a look at the GPUs and at their topology makes is written down, so that tests.unit.fake_nvml can repeat
it where there is no GPU. Events are none of it: they are written by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from experts.health.nvml import Nvml
from experts.health.nvml_topology import read_topology

ASKED_BY, FIELDS = "nvmlDeviceGet", "nvmlDeviceGetFieldValues"  # the latter answers an array of ctypes


class Recorder:
    """Stands before the module pynvml. answers: by GPU, function and arguments, as the files have them."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._devices = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        self.answers: list[dict[str, Any]] = [{} for _ in self._devices]

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._nvml, name)
        handles = name.startswith(("nvmlDeviceGetHandle", "nvmlDeviceGetCount"))
        return self._recorded(name, found) if name.startswith(ASKED_BY) and not handles else found

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        return self._devices[index]

    def nvmlEventSetWait_v2(self, events: object, milliseconds: int) -> Any:
        raise self._nvml.NVMLError(self._nvml.NVML_ERROR_TIMEOUT)

    def _recorded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(device: Any, *arguments: Any) -> Any:
            keys = [str(self._devices.index(a) if a in self._devices else _plain(a)) for a in arguments]
            try:
                answer = function(device, *arguments)
            except self._nvml.NVMLError as error:
                self._note(device, [name, *keys], {"error": error.value})
                raise
            self._note(device, [name, *keys], _plain(list(answer) if name == FIELDS else answer))
            return answer

        return call

    def _note(self, device: Any, path: list[str], answer: Any) -> None:
        place = self.answers[self._devices.index(device)]
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = answer


def _plain(value: Any) -> Any:
    """A value as JSON has it. Lists of one are the arguments and answers of FIELDS."""
    match value:
        case bool() | int() | float() | str() | None:
            return value
        case [one]:
            if isinstance(one, int):
                return one
            return {"error": one.nvmlReturn} if one.nvmlReturn else one.value.uiVal
        case list() | tuple():
            return [_plain(item) for item in value]
    names = [field[0] for field in value._fields_] if hasattr(value, "_fields_") else list(vars(value))
    return {name: _plain(getattr(value, name)) for name in names}


def record(nvml: Any, about: str) -> dict[str, Any]:
    """The contents of a file. nvml: the module, initialised."""
    recorder = Recorder(nvml)
    looked = Nvml(recorder)
    looked.read()
    read_topology(looked)
    return {"about": about, "gpus": recorder.answers}


if __name__ == "__main__":
    import pynvml

    pynvml.nvmlInit()
    print(json.dumps(record(pynvml, sys.argv[1]), indent=2))
