"""Windows: shared memory between one engine and one worker of a host. Its layout is cuda/window.h.

The engine creates a window and tells the worker its name and a nonce over the control stream. The worker takes the name
away as soon as it has mapped the window, and so does the engine when it has the answer, whatever it is. From then on
nothing but the two mappings keeps the memory, so that no death leaves anything behind. Only an engine killed before the
worker has mapped its window leaves a segment; the next `create_window` on that host removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hmac
import mmap
import os
import re
import secrets
import stat
import sys
from pathlib import Path

import torch

from experts.kernels.library import current

SPIN_SECONDS = 30e-6  # how long a wait polls before it sleeps

_FOLDER = Path("/dev/shm")
_NAME = re.compile(r"barista-[1-9][0-9]{0,6}-[0-9a-f]{16}")
_MODE = 0o600

_P, _L, _I, _U = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_uint32

# enum bk_dtype of src/barista_kernels.h
_DTYPES = (torch.float32, torch.bfloat16)

_MAGIC = 0x776F646E69576B62
_VERSION = 1
MAX_NOT_HELD = 1024

# enum bk_window_result of src/window.cpp
LATE, READY, CLOSED, MALFORMED = 0, 1, -1, -2

# Name -> (argument types, result type), of src/window.cpp and src/serve.cpp.
_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "bk_window_supported": ([], _I),
    "bk_window_locate": ([_P, _U, _P], ctypes.c_uint64),
    "bk_window_send": ([_P, _U, _P, _P, _L, _L, _P, _P], _I),
    "bk_window_receive": ([_P, _U, _L, _P], _I),
    "bk_window_take": ([_P, _U, _L, _P], _I),
    "bk_window_answer": ([_P, _U, _P], _I),
    "bk_window_serve": ([_P, _P, _L, _P, _P], _I),
    "bk_window_close": ([_P], None),
    "bk_window_closed": ([_P], _I),
}


class WindowRefused(Exception):
    """This window cannot be used here; rows travel another way. Its text is the reason."""


class Shape(ctypes.Structure):
    """struct bk_window_shape of cuda/window.h."""

    _fields_ = (
        ("size", _U),
        ("num_sources", _U),
        ("max_rows", _U),
        ("top_k", _U),
        ("row_bytes", _U),
        ("reserved", _U),
    )


class _Header(ctypes.Structure):
    """struct bk_window_header of cuda/window.h."""

    _fields_ = (
        ("size", _U),
        ("version", _U),
        ("magic", ctypes.c_uint64),
        ("nonce", ctypes.c_uint8 * 16),
        ("total_bytes", ctypes.c_uint64),
        ("value_dtype", _U),
        ("reserved", _U),
        ("shape", Shape),
    )


class _Offsets(ctypes.Structure):
    """struct bk_window_offsets of cuda/window.h."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("dispatch_cell", "combine_cell", "dispatch", "ids", "rows", "combine", "out")
    )


class _End(ctypes.Structure):
    """struct bk_window_end of src/window.cpp."""

    _fields_ = (("base", _P), ("shape", Shape), ("source", _U), ("reserved", _U), ("spin_nanoseconds", _L))


class Dispatch(ctypes.Structure):
    """struct bk_window_dispatch of cuda/window.h."""

    _fields_ = (
        ("size", _U),
        ("num_rows", _U),
        ("num_pairs", _U),
        ("layer", _U),
        ("step", ctypes.c_uint64),
        ("epoch", ctypes.c_uint64),
        ("attempt", _U),
        ("reserved", _U),
    )


class Combine(ctypes.Structure):
    """struct bk_window_combine of cuda/window.h."""

    _fields_ = (
        ("size", _U),
        ("status", _U),
        ("step", ctypes.c_uint64),
        ("epoch", ctypes.c_uint64),
        ("compute_nanoseconds", ctypes.c_uint64),
        ("layer", _U),
        ("attempt", _U),
        ("num_not_held", _U),
        ("reserved", _U),
        ("not_held", _I * MAX_NOT_HELD),
    )


class Window:
    """One end's mapping. It lives as long as anything refers to it or to a tensor over it.

    name: in /dev/shm. nonce: 16 bytes, secret between the ends. size_bytes: of the segment. hidden_states: [max_rows,
    hidden], topk_ids: [max_rows, top_k] int32, out: [max_rows * top_k, hidden]: tensors over the window's regions.
    end: for the functions of src/window.cpp.
    """

    def __init__(self, functions: ctypes.CDLL, name: str, memory: mmap.mmap, shape: Shape, dtype: torch.dtype) -> None:
        self.functions = functions
        self.name = name
        self.size_bytes = len(memory)
        self.dtype = dtype
        self.max_rows: int = shape.max_rows
        self.top_k: int = shape.top_k
        self.hidden_size: int = shape.row_bytes // dtype.itemsize
        self._start = (ctypes.c_uint8 * len(memory)).from_buffer(memory)
        self.nonce = bytes(_Header.from_buffer(memory).nonce)
        self._end = _End(ctypes.addressof(self._start), shape, 0, 0, int(SPIN_SECONDS * 1e9))
        self.end = ctypes.addressof(self._end)
        _, at = _locate(functions, shape)
        max_pairs = self.max_rows * self.top_k

        def region(offset: int, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
            return torch.frombuffer(memory, dtype=dtype, offset=offset, count=rows * columns).view(rows, columns)

        self.hidden_states = region(at.rows, dtype, self.max_rows, self.hidden_size)
        self.topk_ids = region(at.ids, torch.int32, self.max_rows, self.top_k)
        self.out = region(at.out, dtype, max_pairs, self.hidden_size)

    @property
    def closed(self) -> bool:
        """Whether either end has closed it. Never waits."""
        return bool(self.functions.bk_window_closed(self.end))

    def close(self) -> None:
        """End all waits of both ends for ever. From any thread; idempotent. The memory stays until it is let go."""
        self.functions.bk_window_close(self.end)

    def unlink(self) -> None:
        """Take the name away; the mappings stay. Idempotent."""
        (_FOLDER / self.name).unlink(missing_ok=True)

    def set_spin(self, seconds: float) -> None:
        """How long this end's waits poll before they sleep."""
        self._end.spin_nanoseconds = int(seconds * 1e9)


def create_window(max_rows: int, top_k: int, hidden_size: int, dtype: torch.dtype) -> Window:
    """The engine's end of a new window. All of its memory is taken here, so that no later access can fail.

    Raises OSError when /dev/shm has no room for it, and WindowRefused where windows do not work at all.
    """
    functions = _functions()
    sweep()
    if dtype not in _DTYPES:
        raise WindowRefused(f"rows of {dtype} do not travel in a window")
    shape = Shape(ctypes.sizeof(Shape), 1, max_rows, top_k, hidden_size * dtype.itemsize, 0)
    size_bytes = _size_of(functions, shape)
    name = f"barista-{os.getpid()}-{secrets.token_hex(8)}"
    descriptor = os.open(_FOLDER / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _MODE)
    try:
        # Held by this process and its mapping, and by the kernel's hand no longer than they live: see sweep.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.posix_fallocate(descriptor, 0, size_bytes)
        memory = mmap.mmap(descriptor, size_bytes)
        nonce = (ctypes.c_uint8 * 16)(*secrets.token_bytes(16))
        dtype_code = _DTYPES.index(dtype)
        header = _Header(ctypes.sizeof(_Header), _VERSION, _MAGIC, nonce, size_bytes, dtype_code, 0, shape)
        memory[: header.size] = bytes(header)
        return Window(functions, name, memory, shape, dtype)
    except BaseException:
        (_FOLDER / name).unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def open_window(name: str, nonce: bytes, size_bytes: int) -> Window:
    """The worker's end of a window that an engine has created, whose name is then gone. Raises WindowRefused.

    Reading the nonce proves that both ends share a host. Nothing but a window of our own user is ever opened.
    """
    functions = _functions()
    if not _NAME.fullmatch(name):
        raise WindowRefused(f"{name!r} is not a window's name")
    try:
        descriptor = os.open(_FOLDER / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise WindowRefused(f"{name} cannot be opened here: {error.strerror}") from error
    try:
        _check_file(os.fstat(descriptor), size_bytes)
        memory = mmap.mmap(descriptor, size_bytes)
    except (OSError, ValueError) as error:
        raise WindowRefused(f"{name} cannot be mapped: {error}") from error
    finally:
        os.close(descriptor)
    header = _Header.from_buffer_copy(memory)
    if (header.size, header.version, header.magic) != (ctypes.sizeof(_Header), _VERSION, _MAGIC):
        raise WindowRefused(f"{name} does not begin as a window of version {_VERSION}")
    if not hmac.compare_digest(bytes(header.nonce), nonce):
        raise WindowRefused(f"{name} holds another nonce")
    if header.value_dtype >= len(_DTYPES) or header.shape.row_bytes % _DTYPES[header.value_dtype].itemsize:
        raise WindowRefused(f"{name} holds rows of an unknown type")
    if not header.total_bytes == size_bytes == _size_of(functions, header.shape):
        raise WindowRefused(f"{name} is not laid out as its header says")
    # The header lies in shared memory: only this copy of it is believed from now on.
    shape = Shape.from_buffer_copy(header.shape)
    window = Window(functions, name, memory, shape, _DTYPES[header.value_dtype])
    window.unlink()
    return window


def sweep() -> None:
    """Remove the windows of engines that were killed before their worker had mapped them.

    A live engine holds a lock on its own, which tells its windows from stale ones also where process ids do not, such
    as between containers that share /dev/shm.
    """
    for path in _FOLDER.glob("barista-*-*"):
        if not _NAME.fullmatch(path.name) or _is_alive(int(path.name.split("-")[1])):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _check_file(status: os.stat_result, size_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        raise WindowRefused("the window is not a file of our own user")
    if stat.S_IMODE(status.st_mode) != _MODE:
        raise WindowRefused(f"the window's mode is {stat.S_IMODE(status.st_mode):o}, not {_MODE:o}")
    if status.st_size != size_bytes or size_bytes < ctypes.sizeof(_Header):
        raise WindowRefused(f"the window has {status.st_size} bytes, not {size_bytes}")


def _functions() -> ctypes.CDLL:
    """The functions of src/window.cpp. Raises WindowRefused where there are none."""
    functions = current()
    if functions is None:
        raise WindowRefused("there are no compiled kernels here, which a window needs")
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(functions, name)
        function.argtypes, function.restype = arguments, result
    if sys.platform != "linux" or not functions.bk_window_supported():
        raise WindowRefused("windows need Linux")
    return functions


def _locate(functions: ctypes.CDLL, shape: Shape, source: int = 0) -> tuple[int, _Offsets]:
    """Bytes of a window, 0 if there is no such window, and where the regions of one source lie."""
    at = _Offsets()
    return functions.bk_window_locate(ctypes.addressof(shape), source, ctypes.addressof(at)), at


def _size_of(functions: ctypes.CDLL, shape: Shape) -> int:
    size_bytes, _ = _locate(functions, shape)
    if size_bytes == 0:
        raise WindowRefused(
            f"no window holds {shape.max_rows} rows of {shape.row_bytes} bytes with {shape.top_k} experts each"
        )
    return size_bytes
