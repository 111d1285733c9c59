"""Prometheus metrics of the GPUs under a pool's workers, after the habits of NVIDIA's dcgm-exporter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

LABELS = ("worker", "gpu", "uuid")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuStats:
    """One GPU as its worker told of it last; None for what it does not tell, which then has no sample.

    worker: its name; index: NVML's, -1 if unknown. utilization: 0..1. Error counters count since the driver was loaded,
    xids by number since the worker's start. recovery_action: nvmlDeviceGpuRecoveryAction_t, 0 for none.
    """

    worker: str
    index: int
    uuid: str
    reachable: bool
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    utilization: float | None = None
    temperature_celsius: int | None = None
    throttled: bool | None = None
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    rows_pending: bool | None = None
    nvlinks_active: int | None = None
    nvlink_errors: int | None = None
    recovery_action: int | None = None
    xids: Mapping[int, int] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        """The values of LABELS."""
        return self.worker, str(self.index), self.uuid


# Of GpuStats: field -> description. A metric is called after its field.
GAUGES = {
    "memory_used_bytes": "GPU memory in use, in bytes.",
    "memory_total_bytes": "GPU memory, in bytes.",
    "utilization": "Share of the time in which a kernel ran, 0..1.",
    "temperature_celsius": "Temperature of the GPU.",
    "throttled": "1 while heat or want of power slows the GPU down.",
    "rows_pending": "1 while memory rows wait for a reset of the GPU to be remapped.",
    "nvlinks_active": "NVLinks that are up.",
    "recovery_action": "What the driver asks for: 0 nothing, else see nvmlDeviceGpuRecoveryAction_t.",
}
COUNTERS = {
    "ecc_corrected": "Corrected memory errors since the driver was loaded.",
    "ecc_uncorrected": "Uncorrectable memory errors since the driver was loaded.",
    "nvlink_errors": "Errors of all NVLinks: replays, recoveries, CRC and ECC.",
}


def gpu_metrics(gpus: Sequence[GpuStats], prefix: str) -> Iterator[Metric]:
    """The families that have samples. prefix: of every name, before `gpu_`."""
    if not gpus:
        return
    up = GaugeMetricFamily(f"{prefix}gpu_up", "1 while the driver reaches the GPU.", labels=LABELS)
    for gpu in gpus:
        up.add_metric(gpu.labels, gpu.reachable)
    yield up
    for name, text in GAUGES.items():
        yield from _told(GaugeMetricFamily(f"{prefix}gpu_{name}", text, labels=LABELS), gpus, name)
    for name, text in COUNTERS.items():
        yield from _told(CounterMetricFamily(f"{prefix}gpu_{name}", text, labels=LABELS), gpus, name)
    xids = CounterMetricFamily(f"{prefix}gpu_xid", "The driver's error reports.", labels=(*LABELS, "xid"))
    for gpu in gpus:
        for xid, count in sorted(gpu.xids.items()):
            xids.add_metric((*gpu.labels, str(xid)), count)
    if xids.samples:
        yield xids


def _told(family: GaugeMetricFamily | CounterMetricFamily, gpus: Sequence[GpuStats], name: str) -> Iterator[Metric]:
    """The family with a sample of each GPU that tells this; nothing if none does."""
    for gpu in gpus:
        value = getattr(gpu, name)
        if value is not None:
            family.add_metric(gpu.labels, value)
    if family.samples:
        yield family
