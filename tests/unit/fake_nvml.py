"""Stands in for the module pynvml, with the answers of a file tests/golden/nvml_*.json.

A file has for each GPU what each function answers. An object whose keys are numbers, or ranges such as "0-17", is a
choice by the next argument; {"error": code} is raised as NVMLError; any other object is a struct. "*" is what functions
answer that the file does not name. "events" come one by one, as NVML gives them. The constants are nvidia-ml-py's.
tests.gpu.record_nvml writes such a file on a machine with a GPU.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

GOLDEN = Path(__file__).parents[1] / "golden"

CONSTANTS = {
    "NVML_SUCCESS": 0,
    "NVML_ERROR_INVALID_ARGUMENT": 2,
    "NVML_ERROR_NOT_SUPPORTED": 3,
    "NVML_ERROR_NOT_FOUND": 6,
    "NVML_ERROR_DRIVER_NOT_LOADED": 9,
    "NVML_ERROR_TIMEOUT": 10,
    "NVML_ERROR_LIBRARY_NOT_FOUND": 12,
    "NVML_ERROR_GPU_IS_LOST": 15,
    "NVML_ERROR_RESET_REQUIRED": 16,
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": 18,
    "NVML_TEMPERATURE_GPU": 0,
    "NVML_TEMPERATURE_THRESHOLD_SLOWDOWN": 1,
    "NVML_MEMORY_ERROR_TYPE_CORRECTED": 0,
    "NVML_MEMORY_ERROR_TYPE_UNCORRECTED": 1,
    "NVML_VOLATILE_ECC": 0,
    "NVML_AGGREGATE_ECC": 1,
    "NVML_NVLINK_MAX_LINKS": 36,
    "NVML_NVLINK_DEVICE_TYPE_SWITCH": 2,
    "NVML_FI_DEV_GET_GPU_RECOVERY_ACTION": 230,
    "NVML_P2P_CAPS_INDEX_NVLINK": 2,
    "NVML_P2P_STATUS_OK": 0,
    "nvmlEventTypeXidCriticalError": 8,
}
ERRORS = {2: "Invalid Argument", 3: "Not Supported", 6: "Not Found", 9: "Driver Not Loaded", 10: "Timeout",
          12: "NVML Shared Library Not Found", 15: "GPU is lost", 16: "GPU requires restart",
          18: "RM has detected an NVML/RM version mismatch."}  # fmt: skip


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(ERRORS[value])
        self.value = value


class Device:
    """A handle."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers


class FakeNvml:
    """The module. init_error: of nvmlInit; closed: nvmlShutdown was called."""

    NVMLError = NVMLError

    def __init__(self, name: str, init_error: int = 0) -> None:
        recording = json.loads((GOLDEN / f"nvml_{name}.json").read_text(encoding="utf-8"))
        self.devices = [Device(answers) for answers in recording["gpus"]]
        self.events = deque(recording.get("events", ()))
        self.init_error = init_error
        self.closed = False
        self.registered: list[Device] = []

    def __getattr__(self, name: str) -> Any:
        """A constant, or a function that the file answers."""
        if name in CONSTANTS:
            return CONSTANTS[name]
        if name.startswith("nvmlDeviceGet"):
            return lambda device, *arguments: self._answer(device, name, *arguments)
        raise AttributeError(name)

    def nvmlInit(self) -> None:
        if self.init_error:
            raise NVMLError(self.init_error)

    def nvmlShutdown(self) -> None:
        self.closed = True

    def nvmlDeviceGetCount(self) -> int:
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Device:
        if index >= len(self.devices):
            raise NVMLError(CONSTANTS["NVML_ERROR_INVALID_ARGUMENT"])
        _chosen(self.devices[index].answers.get("nvmlDeviceGetHandleByIndex"), ())
        return self.devices[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Device:
        for device in self.devices:
            if device.answers["nvmlDeviceGetUUID"] == uuid:
                return device
        raise NVMLError(CONSTANTS["NVML_ERROR_NOT_FOUND"])

    def nvmlDeviceGetFieldValues(self, device: Device, fields: list[int]) -> list[SimpleNamespace]:
        values = []
        for field in fields:
            try:
                found = self._answer(device, "nvmlDeviceGetFieldValues", field)
                values.append(SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=found)))
            except NVMLError as error:
                if error.value == CONSTANTS["NVML_ERROR_GPU_IS_LOST"]:
                    raise
                values.append(SimpleNamespace(nvmlReturn=error.value, value=SimpleNamespace(uiVal=4711)))
        return values

    def nvmlDeviceGetP2PStatus(self, device: Device, peer: Device, capability: int) -> int:
        return self._answer(device, "nvmlDeviceGetP2PStatus", self.devices.index(peer), capability)

    def nvmlEventSetCreate(self) -> object:
        return object()

    def nvmlEventSetFree(self, events: object) -> None:
        pass

    def nvmlDeviceRegisterEvents(self, device: Device, kinds: int, events: object) -> None:
        assert kinds, "NVML refuses an empty mask"
        self.registered.append(device)

    def nvmlEventSetWait_v2(self, events: object, milliseconds: int) -> SimpleNamespace:
        assert milliseconds == 0, "nobody waits"
        if not self.events:
            raise NVMLError(CONSTANTS["NVML_ERROR_TIMEOUT"])
        event = self.events.popleft()
        device = self.devices[event["gpu"]] if event["gpu"] is not None else Device({"*": {"error": 15}})
        return SimpleNamespace(device=device, eventType=event["eventType"], eventData=event["eventData"])

    def report_xid(self, xid: int, gpu: int | None = 0) -> None:
        """From now on NVML has this event. gpu: None for one that cannot be asked for its name any more."""
        self.events.append({"gpu": gpu, "eventType": CONSTANTS["nvmlEventTypeXidCriticalError"], "eventData": xid})

    def change(self, function: str, answer: Any, gpu: int = 0) -> None:
        """From now on a GPU answers otherwise."""
        self.devices[gpu].answers[function] = answer

    def lose(self, gpu: int = 0) -> None:
        """The GPU falls off the bus; NVML remembers its name."""
        kept = {name: self.devices[gpu].answers[name] for name in ("nvmlDeviceGetIndex", "nvmlDeviceGetUUID")}
        self.devices[gpu].answers = {**kept, "*": {"error": 15}}

    def _answer(self, device: Device, function: str, *arguments: int) -> Any:
        if function not in device.answers and "*" not in device.answers:
            raise AssertionError(f"the file has no answer of {function}")
        return _chosen(device.answers.get(function, device.answers.get("*")), arguments)


def _chosen(answer: Any, arguments: tuple[int, ...]) -> Any:
    """The answer to these arguments."""
    if not isinstance(answer, dict):
        return answer
    if "error" in answer:
        raise NVMLError(answer["error"])
    if not all(key[0].isdecimal() for key in answer):
        return SimpleNamespace(**answer)
    for key, value in answer.items():
        first, _, last = key.partition("-")
        if int(first) <= arguments[0] <= int(last or first):
            return _chosen(value, arguments[1:])
    raise NVMLError(CONSTANTS["NVML_ERROR_INVALID_ARGUMENT"])
