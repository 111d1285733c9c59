"""What Prometheus is told of GPUs."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from barista.gpu_metrics import GpuStats
from barista.metrics import Metrics
from barista.v1 import controller_pb2 as pb
from experts.health.nvml import Nvml
from experts.health.watch import Record
from experts.health.wire import report_message
from router.api.gpu_stats import gpu_stats
from tests.unit.fake_nvml import FakeNvml


def scrape(gpus: list[GpuStats]) -> dict[tuple[str, ...], float]:
    """(name, worker, gpu, further labels) -> value, of the GPUs' metrics alone."""
    text = Metrics().exposition(None, None, gpus).decode()
    return {
        (
            sample.name.removeprefix("barista:gpu_"),
            *(sample.labels[label] for label in ("worker", "gpu", "xid") if label in sample.labels),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if family.name.startswith("barista:gpu_")
    }


def recorded(name: str) -> list[GpuStats]:
    """The GPUs of a file, as a router hears of them."""
    health = report_message(Record().observe(Nvml(FakeNvml(name)).read(), 0.0))
    return gpu_stats(pb.PoolState(workers=[pb.Worker(name="worker-2", health=health)]))


def test_every_reading_has_a_sample() -> None:
    samples = scrape(recorded("a100_ecc")[:1])
    assert samples == {
        ("up", "worker-2", "0"): 1,
        ("memory_used_bytes", "worker-2", "0"): 64424509440,
        ("memory_total_bytes", "worker-2", "0"): 85899345920,
        ("utilization", "worker-2", "0"): 0.8,
        ("temperature_celsius", "worker-2", "0"): 52,
        ("throttled", "worker-2", "0"): 0,
        ("rows_pending", "worker-2", "0"): 1,
        ("nvlinks_active", "worker-2", "0"): 12,
        ("ecc_corrected_total", "worker-2", "0"): 41,
        ("ecc_uncorrected_total", "worker-2", "0"): 1,
        ("nvlink_errors_total", "worker-2", "0"): 0,
        ("xid_total", "worker-2", "0", "63"): 1,
        ("xid_total", "worker-2", "0", "94"): 1,
    }


def test_what_a_gpu_does_not_tell_has_no_sample() -> None:
    names = {name for name, *_ in scrape(recorded("consumer"))}
    assert names == {
        "up", "memory_used_bytes", "memory_total_bytes", "utilization", "temperature_celsius", "throttled",
    }  # fmt: skip


def test_a_lost_gpu_is_down_beside_one_that_is_up() -> None:
    samples = scrape(recorded("off_the_bus"))
    assert [samples["up", "worker-2", gpu] for gpu in "01"] == [0, 1]
    assert samples["xid_total", "worker-2", "0", "79"] == 1


@pytest.mark.parametrize("state", [pb.PoolState(), pb.PoolState(workers=[pb.Worker(name="worker-0")])])
def test_workers_without_gpus_have_no_metrics_of_them(state: pb.PoolState) -> None:
    assert scrape(gpu_stats(state)) == {}
