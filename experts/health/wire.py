"""A worker's report on its GPUs as a message of barista.v1, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from barista.v1 import experts_pb2 as pb
from experts.health.reading import GpuHealth
from experts.health.verdict import HEALTHY, SLOWDOWN_WEIGHTS, Condition, Verdict
from experts.health.watch import Report

_CONDITIONS = {
    Condition.HEALTHY: pb.Health.CONDITION_HEALTHY,
    Condition.THERMAL: pb.Health.CONDITION_THERMAL,
    Condition.FATAL: pb.Health.CONDITION_FATAL,
}
_BY_NUMBER = {number: condition for condition, number in _CONDITIONS.items()}


def report_message(report: Report) -> pb.Health:
    """What a worker says of its GPUs."""
    return health_message(report.verdict, [_gpu(gpu, report.xids.get(gpu.uuid, {})) for gpu in report.gpus])


def health_message(verdict: Verdict, gpus: Iterable[pb.Gpu]) -> pb.Health:
    """A verdict, and the GPUs that it is on."""
    return pb.Health(condition=_CONDITIONS[verdict.condition], weight=verdict.weight, reason=verdict.reason, gpus=gpus)


def verdict_of(health: pb.Health) -> Verdict:
    """The verdict in it; HEALTHY if nothing is said, or in words of a newer version that are none of ours."""
    condition = _BY_NUMBER.get(health.condition, Condition.HEALTHY)
    return HEALTHY if condition is Condition.HEALTHY else Verdict(condition, health.weight, health.reason)


def _gpu(gpu: GpuHealth, xids: Mapping[int, int]) -> pb.Gpu:
    """None is what the message then lacks."""
    reasons, links = gpu.clock_reasons, gpu.nvlinks
    known: dict[str, Any] = {
        "throttled": None if reasons is None else any(reasons & bit for bit in SLOWDOWN_WEIGHTS),
        "rows_pending": gpu.rows_pending,
    }
    return pb.Gpu(
        index=gpu.index,
        uuid=gpu.uuid,
        name=gpu.name or "",
        reachable=not gpu.unreachable,
        memory_used_bytes=gpu.memory_used_bytes,
        memory_total_bytes=gpu.memory_total_bytes,
        utilization=gpu.utilization,
        temperature_celsius=gpu.temperature,
        ecc_corrected=gpu.ecc_corrected.volatile,
        ecc_uncorrected=gpu.ecc_uncorrected.volatile,
        nvlinks_active=None if links is None else sum(link.active for link in links),
        nvlink_errors=gpu.nvlink_errors,
        recovery_action=gpu.recovery_action,
        xids=xids,
        **known,
    )
