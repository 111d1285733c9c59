"""Where windows lie: memory of this process, memory that processes of a machine share, or a GPU's.

Each kind gives `Block`s, by `create` and, in another process, by `open` of a block's handle.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from barista.errors import ConfigError
from experts.expert_parallel.library import Library

ALIGNMENT = 128
HANDLE_BYTES = 64
_ONE_VERSION = "Run one version and one model on all ranks."


@dataclass(slots=True, eq=False)
class Block:
    """Memory of `size` bytes at `address`. handle(): what another process opens it by; empty for private memory.

    tensor(): the block as a uint8 tensor, which must not be used after close.
    """

    address: int
    size: int
    handle: Callable[[], bytes]
    owner: Any
    tensor: Callable[[], torch.Tensor]
    close: Callable[[], None]


class Memory(Protocol):
    """A kind of memory."""

    def create(self, size: int) -> Block:
        """New memory, its contents unspecified."""
        ...

    def open(self, handle: bytes, size: int) -> Block:
        """The block of another process that has this handle."""
        ...


class PrivateMemory:
    """Ordinary memory, for ranks that share a process."""

    def create(self, size: int) -> Block:
        """As Memory.create."""
        tensor = torch.zeros(size + ALIGNMENT, dtype=torch.uint8)
        tensor = tensor[-tensor.data_ptr() % ALIGNMENT :][:size]
        return Block(tensor.data_ptr(), size, bytes, tensor, lambda: tensor, lambda: None)

    def open(self, handle: bytes, size: int) -> Block:
        """Private memory has no handle. Raises ConfigError."""
        raise ConfigError("The window is in another process's own memory.", "Use SharedMemory between processes.")


class SharedMemory:
    """Memory without a name that processes of one machine share by a file descriptor of /proc; it goes with them."""

    def create(self, size: int) -> Block:
        """As Memory.create."""
        fd = os.memfd_create("barista-expert-parallel", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return _mapped(fd, size, f"/proc/{os.getpid()}/fd/{fd}".encode())

    def open(self, handle: bytes, size: int) -> Block:
        """As Memory.open. Raises ConfigError if the other process has gone, or its block is of another size."""
        try:
            fd = os.open(handle.decode(), os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(
                f"The window {handle.decode()} cannot be opened: {error.strerror}.",
                "Both processes must run on this machine, as one user.",
            ) from error
        if (found := os.fstat(fd).st_size) != size:
            os.close(fd)
            raise ConfigError(f"The window {handle.decode()} has {found} bytes, expected {size}.", _ONE_VERSION)
        return _mapped(fd, size, handle)


def _mapped(fd: int, size: int, handle: bytes) -> Block:
    pages = mmap.mmap(fd, size)
    tensor = torch.frombuffer(pages, dtype=torch.uint8)
    return Block(tensor.data_ptr(), size, lambda: handle, pages, lambda: tensor, lambda: os.close(fd))


class GpuMemory:
    """Memory of one GPU, by CUDA IPC between processes. device: its CUDA index in this process."""

    def __init__(self, library: Library, device: int) -> None:
        self._library = library
        self._device = device

    def create(self, size: int) -> Block:
        """As Memory.create. Raises KernelError, for one when the GPU has no room."""
        at = ctypes.c_void_p()
        with torch.cuda.device(self._device):
            self._library.call("ep_memory_create", size, ctypes.byref(at))

        def export() -> bytes:
            handle = (ctypes.c_uint8 * HANDLE_BYTES)()
            self._library.call("ep_memory_export", at, handle)
            return bytes(handle)

        return self._block(at, size, export, "ep_memory_free")

    def open(self, handle: bytes, size: int) -> Block:
        """As Memory.open: of a GPU that this one reaches."""
        at = ctypes.c_void_p()
        with torch.cuda.device(self._device):
            self._library.call("ep_memory_open", (ctypes.c_uint8 * HANDLE_BYTES)(*handle), ctypes.byref(at))
        return self._block(at, size, lambda: handle, "ep_memory_close")

    def _block(self, at: ctypes.c_void_p, size: int, handle: Callable[[], bytes], close: str) -> Block:
        address = at.value or 0
        view = _CudaBytes(address, size)
        device = torch.device("cuda", self._device)
        return Block(
            address,
            size,
            handle,
            view,
            lambda: torch.as_tensor(view, device=device),
            lambda: self._library.call(close, ctypes.c_void_p(address)),
        )


class _CudaBytes:
    """What torch takes a tensor over foreign memory from."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }
