"""Reads GPUs through NVML. No call waits: events that have not happened yet are left for the next look."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from barista.errors import ConfigError
from experts.health.reading import EccErrors, GpuHealth, NvLink

MAX_EVENTS = 256  # of one look; a GPU that reports more than these has said enough
LINK_ERRORS = ("replay", "recovery", "crc_flit", "crc_data", "ecc_data")  # NVML_NVLINK_ERROR_DL_*, from 0


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU to look at. index: -1 if unknown. device: NVML's handle, None for a GPU that was lost before there was one.

    lost: NVML's words for that.
    """

    index: int
    uuid: str
    device: Any
    lost: str = ""


class Unreachable(Exception):
    """The GPU does not answer any more, in NVML's words."""


def open_nvml(gpus: Sequence[str] | None = None, nvml: Any = None) -> Nvml | None:
    """NVML, or None where there is no driver of NVIDIA and so no GPU of theirs.

    gpus: indices or UUIDs as CUDA_VISIBLE_DEVICES has them, but indices in NVML's order, which is that of the PCI bus;
    None for all. nvml: the module pynvml, or what stands in for it. Raises ConfigError when nvidia-ml-py is not
    installed, the driver refuses, or there is no such GPU.
    """
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError as error:
            raise ConfigError(
                "The health of GPUs cannot be read: nvidia-ml-py is not installed.", "Run: pip install nvidia-ml-py"
            ) from error
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if error.value in (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED):
            return None
        raise ConfigError(
            f"The health of GPUs cannot be read: NVML says {str(error)!r}.",
            "Does nvidia-smi run here, as this user and in this container?",
        ) from error
    return Nvml(nvml, gpus)


class Nvml:
    """The GPUs that `open_nvml` was asked for. library: the module pynvml. One thread at a time."""

    def __init__(self, nvml: Any, gpus: Sequence[str] | None = None) -> None:
        self.library = nvml
        names = [str(index) for index in range(nvml.nvmlDeviceGetCount())] if gpus is None else gpus
        self.gpus = tuple(self._find(name) for name in names)
        self._closed = False
        self._events: Any = None
        self._watched: frozenset[str] = frozenset()
        self._register()

    def read(self) -> tuple[GpuHealth, ...]:
        """Every GPU as it is now, in the order that was asked for."""
        xids = self._new_xids()
        return tuple(self._read(gpu, tuple(xids[gpu.uuid]) if gpu.uuid in xids else None) for gpu in self.gpus)

    def ask(self, device: Any, function: str, *arguments: Any) -> Any:
        """What NVML answers, None for what it does not know of this device. Raises Unreachable."""
        try:
            return getattr(self.library, function)(device, *arguments)
        except self.library.NVMLError as error:
            if self._is_lost(error):
                raise Unreachable(str(error)) from error
            return None

    def close(self) -> None:
        """End the use of NVML. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._events is not None:
            self._quietly(self.library.nvmlEventSetFree, self._events)
        self._quietly(self.library.nvmlShutdown)

    def _find(self, name: str) -> Gpu:
        nvml = self.library
        known = (int(name), "") if name.isdecimal() else (-1, name)
        try:
            if name.isdecimal():
                device = nvml.nvmlDeviceGetHandleByIndex(int(name))
            else:
                device = nvml.nvmlDeviceGetHandleByUUID(name)
        except nvml.NVMLError as error:
            if self._is_lost(error):
                return Gpu(*known, None, str(error))
            raise ConfigError(
                f"There is no GPU {name!r}: NVML says {str(error)!r}.", "nvidia-smi -L shows those that there are."
            ) from error
        try:
            index, uuid = (self.ask(device, f"nvmlDeviceGet{what}") for what in ("Index", "UUID"))
        except Unreachable as lost:
            return Gpu(*known, None, str(lost))
        return Gpu(-1 if index is None else index, uuid or "", device)

    def _is_lost(self, error: Any) -> bool:
        """It fell off the bus, or answers nothing but that it needs a reset."""
        nvml = self.library
        return error.value in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED)

    def _quietly(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """None if NVML refuses."""
        try:
            return function(*arguments)
        except self.library.NVMLError:
            return None

    # ------------------------------------------------------------------ one reading

    def _read(self, gpu: Gpu, xids: tuple[int, ...] | None) -> GpuHealth:
        if gpu.device is None:
            return GpuHealth(index=gpu.index, uuid=gpu.uuid, xids=xids, unreachable=gpu.lost)
        try:
            return GpuHealth(index=gpu.index, uuid=gpu.uuid, xids=xids, **self._values(gpu.device))
        except Unreachable as lost:
            return GpuHealth(index=gpu.index, uuid=gpu.uuid, xids=xids, unreachable=str(lost))

    def _values(self, device: Any) -> Mapping[str, Any]:
        nvml = self.library
        memory = self.ask(device, "nvmlDeviceGetMemoryInfo")
        busy = self.ask(device, "nvmlDeviceGetUtilizationRates")
        rows = self.ask(device, "nvmlDeviceGetRemappedRows")  # corrected, uncorrected, pending, failed
        slowdown = nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        return {
            "name": self.ask(device, "nvmlDeviceGetName"),
            "memory_used_bytes": None if memory is None else memory.used,
            "memory_total_bytes": None if memory is None else memory.total,
            "utilization": None if busy is None else busy.gpu / 100,
            "temperature": self.ask(device, "nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            "slowdown_temperature": self.ask(device, "nvmlDeviceGetTemperatureThreshold", slowdown),
            "clock_reasons": self.ask(device, "nvmlDeviceGetCurrentClocksEventReasons"),
            "ecc_corrected": self._ecc(device, nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            "ecc_uncorrected": self._ecc(device, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
            "rows_pending": None if rows is None else bool(rows[2]),
            "rows_failed": None if rows is None else bool(rows[3]),
            "nvlinks": self._nvlinks(device),
            "recovery_action": self._field(device, nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION),
        }

    def _ecc(self, device: Any, kind: int) -> EccErrors:
        kinds = (self.library.NVML_VOLATILE_ECC, self.library.NVML_AGGREGATE_ECC)
        return EccErrors(*[self.ask(device, "nvmlDeviceGetTotalEccErrors", kind, counter) for counter in kinds])

    def _nvlinks(self, device: Any) -> tuple[NvLink, ...] | None:
        """None for a GPU without NVLink. Beyond its last link NVML answers nothing."""
        links = []
        for number in range(self.library.NVML_NVLINK_MAX_LINKS):
            active = self.ask(device, "nvmlDeviceGetNvLinkState", number)
            if active is None:
                break
            counts = [
                (name, self.ask(device, "nvmlDeviceGetNvLinkErrorCounter", number, counter) if active else None)
                for counter, name in enumerate(LINK_ERRORS)
            ]
            links.append(NvLink(bool(active), {name: count for name, count in counts if count is not None}))
        return tuple(links) or None

    def _field(self, device: Any, field: int) -> int | None:
        """A field of the type unsigned int."""
        values = self.ask(device, "nvmlDeviceGetFieldValues", [field])
        if values is None or values[0].nvmlReturn != self.library.NVML_SUCCESS:
            return None
        return int(values[0].value.uiVal)

    # ------------------------------------------------------------------ events

    def _register(self) -> None:
        """Ask for the XIDs of every GPU that reports them."""
        nvml = self.library
        self._events = self._quietly(nvml.nvmlEventSetCreate)
        if self._events is None:
            return
        watched = set()
        for gpu in self.gpus:
            kinds = 0 if gpu.device is None else self._quietly(nvml.nvmlDeviceGetSupportedEventTypes, gpu.device)
            wanted = (kinds or 0) & nvml.nvmlEventTypeXidCriticalError
            if wanted:
                try:
                    nvml.nvmlDeviceRegisterEvents(gpu.device, wanted, self._events)
                except nvml.NVMLError:
                    continue
                watched.add(gpu.uuid)
        self._watched = frozenset(watched)

    def _new_xids(self) -> dict[str, list[int]]:
        """By UUID, for the GPUs that report any. One whose GPU cannot be told is every GPU's, for safety."""
        xids: dict[str, list[int]] = {uuid: [] for uuid in self._watched}
        for _ in range(MAX_EVENTS if self._watched else 0):
            event = self._quietly(self.library.nvmlEventSetWait_v2, self._events, 0)
            if event is None:
                break
            if event.eventType & self.library.nvmlEventTypeXidCriticalError:
                uuid = self._quietly(self.library.nvmlDeviceGetUUID, event.device)
                for name in xids if uuid is None else xids.keys() & {uuid}:
                    xids[name].append(int(event.eventData))
        return xids
