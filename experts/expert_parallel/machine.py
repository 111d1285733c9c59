"""Which kernels and which memory a device takes, and what GPUs must have before a group is made on them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from barista.errors import ConfigError
from experts.expert_parallel.library import OLDEST_CAPABILITY, Library, cpu_library, cuda_path
from experts.expert_parallel.memory import GpuMemory, Memory, SharedMemory


def library_for(device: torch.device) -> Library:
    """The kernels of a device. Raises ConfigError, and as cpu_library and cuda_path do."""
    return cuda_library() if device.type == "cuda" else cpu_library()


def memory_for(device: torch.device, library: Library) -> Memory:
    """The memory of windows on a device, as several processes use it."""
    return GpuMemory(library, device.index or 0) if device.type == "cuda" else SharedMemory()


def using(device: torch.device) -> AbstractContextManager[object]:
    """While this lasts, the kernels' calls of this thread are for the device: a new thread begins on the first GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def cuda_library() -> Library:
    """The kernels for GPUs, once every visible one is known to run them. Raises ConfigError for what is missing."""
    if not torch.cuda.is_available():
        raise ConfigError("PyTorch sees no GPU.", "Look at nvidia-smi, and install a CUDA build of PyTorch.")
    for index in range(torch.cuda.device_count()):
        check_capability(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
    library = Library("cuda", cuda_path())
    driver, runtime = ctypes.c_int32(), ctypes.c_int32()
    library.call("ep_versions", ctypes.byref(driver), ctypes.byref(runtime))
    check_versions(driver.value, runtime.value)
    return library


def check_capability(name: str, capability: tuple[int, int]) -> None:
    """Raise ConfigError for a GPU older than the code that there is."""
    if capability < OLDEST_CAPABILITY:
        raise ConfigError(
            f"{name} has compute capability {capability[0]}.{capability[1]}; the kernels are built for 8.0 and newer.",
            "Use an A100 or newer GPU, or hide this one with CUDA_VISIBLE_DEVICES.",
        )


def check_versions(driver: int, runtime: int) -> None:
    """Raise ConfigError for a driver of an older major CUDA than the kernels were built with.

    Both are 1000 x major + 10 x minor; within one major version an older driver runs newer code (CUDA's minor version
    compatibility), but not PTX.
    """
    if driver // 1000 < runtime // 1000:
        raise ConfigError(
            f"The NVIDIA driver serves CUDA {driver // 1000}.{driver % 1000 // 10}, but the kernels were built with "
            f"{runtime // 1000}.{runtime % 1000 // 10}.",
            "Update the driver, or build the kernels with an older toolkit: put its nvcc first on PATH, `make cuda`.",
        )


def check_peers(library: Library, engine: int, workers: Sequence[int]) -> None:
    """Raise ConfigError unless the engine's GPU and each worker's can write into one another's memory."""
    for worker in workers:
        for device, peer in ((engine, worker), (worker, engine)):
            can = ctypes.c_int32()
            library.call("ep_memory_reaches", device, peer, ctypes.byref(can))
            if not can.value:
                raise ConfigError(
                    f"GPU {device} cannot reach the memory of GPU {peer}.",
                    "Choose GPUs with peer access (nvidia-smi topo -p2p rw), or workers on the CPU.",
                )
