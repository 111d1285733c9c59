"""What a process remembers of its GPUs, and that nobody waits for a look at them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.health.nvml import Nvml
from experts.health.reading import GpuHealth
from experts.health.verdict import HEALTHY, Condition
from experts.health.watch import COOLED_SECONDS, GpuWatch, Record, Report
from tests.unit.fake_nvml import FakeNvml

WELL = GpuHealth(index=0, uuid="GPU-a", clock_reasons=0, xids=())
HOT = replace(WELL, clock_reasons=0x40)
BROKEN = replace(WELL, xids=(79,))
PATIENCE = 10.0


@given(st.lists(st.sampled_from([WELL, HOT, BROKEN])))
def test_a_fatal_verdict_stays(looks: list[GpuHealth]) -> None:
    record = Record()
    for now, gpu in enumerate(looks):
        report = record.observe([gpu], 1000.0 * now)
        broken = BROKEN in looks[: now + 1]
        assert (report.verdict.condition is Condition.FATAL) == broken


def test_what_is_told_of_a_fatal_verdict_is_what_came_first() -> None:
    record = Record()
    first = record.observe([BROKEN], 0.0).verdict
    assert record.observe([replace(WELL, unreachable="GPU is lost")], 1.0).verdict == first


def test_a_slowdown_stays_until_the_gpu_has_been_cool_for_a_while() -> None:
    record = Record()
    hot = record.observe([HOT], 0.0).verdict
    record.observe([WELL], 1.0)
    assert record.observe([HOT], 20.0).verdict == hot
    assert record.observe([WELL], 20.0 + COOLED_SECONDS - 1).verdict == hot
    assert record.observe([WELL], 20.0 + COOLED_SECONDS).verdict == HEALTHY


def test_a_gpu_that_cools_does_not_excuse_another() -> None:
    other = replace(WELL, index=1, uuid="GPU-b")
    record = Record()
    record.observe([HOT, other], 0.0)
    later = COOLED_SECONDS
    assert record.observe([WELL, replace(other, clock_reasons=0x20)], later).verdict.reason.startswith("GPU 1")


@given(st.lists(st.lists(st.integers(1, 4), max_size=4)))
def test_every_xid_is_counted(looks: list[list[int]]) -> None:
    record = Record()
    report = record.observe([WELL], 0.0)
    for xids in looks:
        report = record.observe([replace(WELL, xids=tuple(xids))], 0.0)
    seen = [xid for xids in looks for xid in xids]
    assert report.xids == {"GPU-a": {xid: seen.count(xid) for xid in set(seen)}}


def test_a_gpu_without_events_has_no_count_of_them() -> None:
    assert Record().observe([replace(WELL, xids=None)], 0.0).xids == {}


# ---------------------------------------------------------------------- the looks


@contextmanager
def watched(fake: FakeNvml, look_seconds: float = 3600.0) -> Iterator[GpuWatch]:
    watch = GpuWatch(Nvml(fake, ["0"]), look_seconds=look_seconds)
    try:
        yield watch
    finally:
        watch.close()


def test_the_first_report_is_there_at_once() -> None:
    with watched(FakeNvml("h200_throttled")) as watch:
        assert watch.report.verdict.condition is Condition.THERMAL


def test_what_happens_later_is_seen_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeNvml("h100_healthy")
    with watched(fake) as watch:
        fake.lose()
        watch.look()
        watch.look()
        assert watch.report.verdict.condition is Condition.FATAL
    assert [record.getMessage().split(".")[0] for record in caplog.records] == ["The GPUs are fatal"]


def test_a_look_that_fails_is_not_the_last(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeNvml("h100_healthy")
    with watched(fake) as watch:
        fake.change("nvmlDeviceGetMemoryInfo", 17)  # no struct
        watch.look()
        assert watch.report.verdict == HEALTHY
        fake.lose()
        watch.look()
        assert watch.report.verdict.condition is Condition.FATAL
    assert "could not be looked at" in caplog.text


def test_a_first_look_that_fails_is_no_reason_not_to_serve(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeNvml("h100_healthy")
    fake.change("nvmlDeviceGetMemoryInfo", 17)
    with watched(fake) as watch:
        assert watch.report == Report()
    assert "could not be looked at" in caplog.text


class Hanging(FakeNvml):
    """A driver that keeps its caller once `stuck` is set, until it is told to let go."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.stuck, self.asked, self.let_go, self.shut = (threading.Event() for _ in range(4))

    def nvmlEventSetWait_v2(self, events: object, milliseconds: int) -> object:
        if self.stuck.is_set():
            self.asked.set()
            assert self.let_go.wait(PATIENCE)
        return super().nvmlEventSetWait_v2(events, milliseconds)

    def nvmlShutdown(self) -> None:
        self.shut.set()


def test_a_driver_that_hangs_keeps_nobody_waiting() -> None:
    fake = Hanging("h100_healthy")
    with watched(fake, look_seconds=0.001) as watch:
        fake.stuck.set()
        assert fake.asked.wait(PATIENCE)
        assert watch.report.verdict == HEALTHY
        fake.let_go.set()


def test_the_end_of_the_watch_ends_nvml() -> None:
    fake = Hanging("h100_healthy")
    with watched(fake):
        assert not fake.shut.is_set()
    assert fake.shut.wait(PATIENCE)
