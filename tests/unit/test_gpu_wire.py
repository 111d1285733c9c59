"""What a worker says of its GPUs, and what others understand."""

from __future__ import annotations

import pytest

from barista.v1 import controller_pb2, experts_pb2
from experts.controller.wire import description_of
from experts.health.nvml import Nvml
from experts.health.verdict import HEALTHY, Condition, Verdict
from experts.health.watch import Record, Report
from experts.health.wire import health_message, report_message, verdict_of
from experts.pool_view import view_of
from tests.unit.fake_nvml import FakeNvml

FILES = ["h100_healthy", "h200_throttled", "a100_ecc", "off_the_bus", "consumer"]


def report(name: str) -> Report:
    return Record().observe(Nvml(FakeNvml(name)).read(), 0.0)


@pytest.mark.parametrize("name", FILES)
def test_a_verdict_arrives_as_it_was_sent(name: str) -> None:
    sent = report(name)
    message = experts_pb2.DescribeReply.FromString(
        experts_pb2.DescribeReply(health=report_message(sent)).SerializeToString()
    )
    description = description_of(message)
    assert description.verdict == sent.verdict
    assert [gpu.uuid for gpu in description.gpus] == [gpu.uuid for gpu in sent.gpus]


def test_what_a_gpu_does_not_tell_is_absent() -> None:
    (gpu, _) = report_message(report("consumer")).gpus
    told = {field.name for field, _ in gpu.ListFields()}
    assert told == {
        "uuid", "name", "reachable", "memory_used_bytes", "memory_total_bytes", "utilization", "temperature_celsius",
        "throttled",
    }  # fmt: skip


def test_what_a_gpu_tells_is_there_also_where_it_is_nothing() -> None:
    (gpu, _) = report_message(report("h100_healthy")).gpus
    assert gpu.HasField("ecc_uncorrected")
    assert gpu.HasField("nvlink_errors")
    assert (gpu.nvlinks_active, gpu.recovery_action, gpu.throttled) == (18, 0, False)


def test_xids_are_told_by_number() -> None:
    (first, second) = report_message(report("a100_ecc")).gpus
    assert (dict(first.xids), dict(second.xids)) == ({63: 1, 94: 1}, {})


def test_a_worker_that_says_nothing_is_healthy() -> None:
    assert description_of(experts_pb2.DescribeReply()).verdict == HEALTHY


def test_a_condition_of_a_newer_version_is_not_understood_as_trouble() -> None:
    assert verdict_of(experts_pb2.Health(condition=17, weight=0.1)) == HEALTHY  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "verdict", [HEALTHY, Verdict(Condition.THERMAL, 0.5, "hot"), Verdict(Condition.FATAL, 0.0, "broken")]
)
def test_engines_are_told_the_weight(verdict: Verdict) -> None:
    worker = controller_pb2.Worker(
        name="worker-0", address="h:1", state=controller_pb2.WORKER_STATE_READY, health=health_message(verdict, [])
    )
    assert view_of(controller_pb2.PoolState(workers=[worker])).workers[0].weight == verdict.weight
