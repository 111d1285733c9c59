"""The GPUs of a pool, for its metrics."""

from __future__ import annotations

from typing import Any

from barista.gpu_metrics import COUNTERS, GAUGES, GpuStats
from barista.v1 import controller_pb2 as pb


def gpu_stats(state: pb.PoolState) -> list[GpuStats]:
    """Every GPU that a worker tells of. One that two workers share is there twice."""
    return [_stats(worker.name, gpu) for worker in state.workers for gpu in worker.health.gpus]


def _stats(worker: str, gpu: Any) -> GpuStats:
    told = {name: getattr(gpu, name) for name in (*GAUGES, *COUNTERS) if gpu.HasField(name)}
    return GpuStats(worker=worker, index=gpu.index, uuid=gpu.uuid, reachable=gpu.reachable, xids=dict(gpu.xids), **told)
