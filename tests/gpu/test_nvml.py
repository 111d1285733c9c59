"""The health of the GPUs that there really are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from experts.health.nvml import Nvml, open_nvml
from experts.health.nvml_topology import read_topology
from experts.health.topology import plan_gpus

pytestmark = pytest.mark.gpu


@pytest.fixture
def nvml() -> Iterator[Nvml]:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    opened = open_nvml()
    if opened is None:
        pytest.skip("there is no driver of NVIDIA")
    yield opened
    opened.close()


def test_a_gpu_tells_its_name_memory_and_temperature(nvml: Nvml) -> None:
    for gpu in nvml.read():
        assert gpu.unreachable == ""
        assert gpu.uuid.startswith("GPU-")
        assert gpu.name
        assert gpu.memory_used_bytes is not None
        assert gpu.memory_total_bytes is not None
        assert 0 <= gpu.memory_used_bytes <= gpu.memory_total_bytes
        assert gpu.temperature is not None
        assert 0 < gpu.temperature < 120


def test_a_gpu_is_found_again_by_its_uuid(nvml: Nvml) -> None:
    for gpu in nvml.read():
        again = open_nvml([gpu.uuid])
        assert again is not None
        assert [found.index for found in again.read()] == [gpu.index]
        again.close()


def test_a_second_look_repeats_no_event(nvml: Nvml) -> None:
    nvml.read()
    assert all(not gpu.xids for gpu in nvml.read())


def test_the_topology_has_every_gpu_and_a_plan(nvml: Nvml) -> None:
    topology = read_topology(nvml)
    assert topology.gpus == tuple(gpu.index for gpu in nvml.gpus)
    assert plan_gpus(topology, 1, len(topology.gpus) - 1).trunk
