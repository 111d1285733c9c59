"""The GPUs of a group: neighbours first, and none that is broken."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from barista.errors import ConfigError
from experts.expert_parallel.gpus import Fitness, GroupGpus, choose_gpus
from experts.health import watch
from tests.unit.fake_nvml import FakeNvml

HGX = "GPU-aaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaaaaaa", "GPU-bbbbbbbb-bbbb-bbbb-bbbb-bbbbbbbbbbbb"
NO_DRIVER = 12


@given(st.integers(1, 9), st.integers(1, 17))
def test_without_a_driver_that_answers_gpus_are_taken_in_order(num_gpus: int, num_workers: int) -> None:
    gpus = choose_gpus([f"GPU-{i}" for i in range(num_gpus)], num_workers, FakeNvml("h100_healthy", NO_DRIVER))
    assert gpus.engine == 0
    assert len(gpus.workers) == num_workers
    assert set(gpus.workers) <= set(range(num_gpus))
    if num_gpus > num_workers:
        assert gpus.workers == tuple(range(1, 1 + num_workers))
    else:
        shares = [gpus.workers.count(gpu) for gpu in range(num_gpus)]
        assert max(shares) - min(shares) <= 1


def test_cudas_order_may_be_another_than_nvmls() -> None:
    assert choose_gpus(HGX, 1, FakeNvml("h100_healthy")) == GroupGpus(0, (1,))
    assert choose_gpus(HGX[::-1], 1, FakeNvml("h100_healthy")) == GroupGpus(1, (0,))  # NVML's first is CUDA's second


def test_a_gpu_that_nvml_does_not_know_leaves_the_order(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_gpus(("GPU-x", *HGX), 2, FakeNvml("h100_healthy")) == GroupGpus(0, (1, 2))
    assert "GPU-x" in caplog.text


@contextmanager
def watched(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fitness]:
    monkeypatch.setattr(watch.GpuWatch.__init__, "__defaults__", (time.monotonic, 0.01))
    fitness = Fitness((0, 1, 1), HGX, lambda: nvml)
    try:
        yield fitness
    finally:
        fitness.close()


def test_a_gpu_that_falls_off_the_bus_is_unfit_and_its_neighbour_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml("h100_healthy")
    with watched(nvml, monkeypatch) as fitness:
        assert fitness.unfit() == frozenset()
        nvml.lose(1)
        deadline = time.monotonic() + 30
        while not fitness.unfit():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert fitness.unfit() == {1}


def test_a_hot_gpu_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml("h100_healthy")
    nvml.change("nvmlDeviceGetCurrentClocksEventReasons", 0x40, gpu=1)
    with watched(nvml, monkeypatch) as fitness:
        assert fitness.unfit() == frozenset()


def test_a_gpu_that_is_broken_from_the_start_gets_no_worker() -> None:
    nvml = FakeNvml("h100_healthy")
    nvml.change("nvmlDeviceGetFieldValues", {"230": 1}, gpu=1)  # the driver wants it reset
    with pytest.raises(ConfigError, match="1 of 2 can be used"):
        choose_gpus(HGX, 1, nvml)


def test_what_cannot_be_watched_counts_as_fit_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    fitness = Fitness((0, 1), ("GPU-x", HGX[0]), lambda: FakeNvml("h100_healthy"))
    assert fitness.unfit() == frozenset()
    assert "GPU 0 is not watched" in caplog.text
    fitness.close()


def test_without_a_driver_nothing_is_watched() -> None:
    fitness = Fitness((0, 1), HGX, lambda: FakeNvml("h100_healthy", NO_DRIVER))
    assert fitness.unfit() == frozenset()
    fitness.close()
