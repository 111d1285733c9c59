"""The kernels for GPUs compile for every architecture, use no local memory, and say so when they cannot be had."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from barista.errors import BaristaError, ConfigError
from experts.expert_parallel import library, machine
from experts.expert_parallel.shape import GroupShape

CUDA = Path(__file__).parents[2] / "cuda"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")

CLEAN = "ptxas info\n    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"


@pytest.fixture(scope="module")
def built() -> Path:
    """Compiled with warnings as errors, and refused by library.cuda_path if ptxas reports local memory."""
    return library.cuda_path()


@needs_nvcc
def test_the_library_holds_code_for_every_architecture_and_ptx_for_later_ones(built: Path) -> None:
    if shutil.which("cuobjdump") is None:
        pytest.skip("cuobjdump is not on PATH")
    listed = subprocess.run(
        ["cuobjdump", "--list-elf", "--list-ptx", str(built)], capture_output=True, text=True, check=True
    ).stdout
    for name in (*(f"sm_{architecture}.cubin" for architecture in library.ARCHITECTURES), "sm_90.ptx"):
        assert name in listed


@needs_nvcc
def test_the_library_knows_the_same_structs_and_offsets_as_its_twin(built: Path) -> None:
    """Which it tells without a GPU: the first call that needs one is refused in CUDA's words."""
    gpu, shape = library.Library("cuda", built), GroupShape(num_ranks=3, num_experts=8, max_local_experts=4, top_k=2,
                                                            hidden_size=256, max_tokens=9, wire="fp8")  # fmt: skip
    (size, ours), (wanted, theirs) = (each.window_bytes(shape.struct()) for each in (gpu, library.cpu_library()))
    assert (size, bytes(ours)) == (wanted, bytes(theirs))
    if not torch.cuda.is_available():
        with pytest.raises(library.KernelError, match="ep_memory_create failed: "):
            gpu.call("ep_memory_create", 1024, ctypes.byref(ctypes.c_void_p()))


@needs_nvcc
@pytest.mark.parametrize("source", sorted(CUDA.glob("*.cu")), ids=lambda path: path.stem)
def test_every_source_compiles_alone(source: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["nvcc", "-std=c++17", f"-I{CUDA}", "-gencode", "arch=compute_90a,code=sm_90a", "-c", str(source),
         "-o", str(tmp_path / "object.o")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "log",
    [
        CLEAN + "    64 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n",
        CLEAN + "    0 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads\n",
        "nothing of ptxas",
    ],
)
def test_local_memory_is_an_error(log: str) -> None:
    with pytest.raises(BaristaError, match="local memory"):
        library.no_local_memory(log)


def test_no_local_memory_is_none() -> None:
    library.no_local_memory(CLEAN * 3)


def test_without_nvcc_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("BARISTA_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="nvcc was not found") as refused:
        library.cuda_path()
    assert "make cuda" in refused.value.remedy


def test_an_installed_package_has_its_library_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = tmp_path / "lib" / "cuda.so"
    monkeypatch.setattr(library, "INSTALLED", installed)
    monkeypatch.setattr(library, "_compile", lambda target, command, check: target)
    if shutil.which("nvcc"):
        assert library.install_cuda(CUDA) == installed
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr(library, "SOURCES", tmp_path / "no-checkout")
    assert library.cuda_path() == installed


def test_a_gpu_that_is_too_old_is_refused_by_name() -> None:
    machine.check_capability("NVIDIA A100", (8, 0))
    machine.check_capability("NVIDIA H200", (9, 0))
    with pytest.raises(ConfigError, match=r"Tesla T4 has compute capability 7\.5"):
        machine.check_capability("Tesla T4", (7, 5))


@pytest.mark.parametrize(("driver", "good"), [(13000, True), (13020, True), (14000, True), (12080, False), (0, False)])
def test_a_driver_that_is_too_old_is_refused(driver: int, good: bool) -> None:
    if good:
        machine.check_versions(driver, 13000)
        return
    with pytest.raises(ConfigError, match=f"serves CUDA {driver // 1000}") as refused:
        machine.check_versions(driver, 13000)
    assert "Update the driver" in refused.value.remedy
