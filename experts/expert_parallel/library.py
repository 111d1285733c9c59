"""The compiled kernels of cuda/ep.h: for GPUs by nvcc, their CPU twin by the C++ compiler; one interface, one truth.

Both are compiled once into Barista's cache, under a digest of their sources, unless the installed package has them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from barista.cache import MOVE_CACHE, cache_root
from barista.errors import BaristaError, CacheError, ConfigError
from experts.expert_parallel.structs import OffsetsStruct, RankStruct, ShapeStruct, StateStruct
from experts.kernels import compiler

SOURCES = Path(__file__).parents[2] / "cuda"  # of a checkout; an installed package has the library instead
INSTALLED = Path(__file__).parent / "lib" / "cuda.so"

# Code for A100, H100 and H200, and B200, and PTX from which a driver makes it for what came later.
ARCHITECTURES = ("80", "90a", "100a")
OLDEST_CAPABILITY = (8, 0)
_GENERATE = tuple(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES)
NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    *_GENERATE,
    "-gencode=arch=compute_90,code=compute_90",
    "-Xptxas=-v,-warn-spills,-warn-lmem-usage",
    "-Werror=all-warnings",
    "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror",
    "-shared",
)
# No contraction: the CPU's sums round where the GPU's do.
_HOST_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-Wall", "-Wextra", "-shared")

_P, _U, _I = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int32

# Name -> (argument types, result type), of cuda/ep.h.
_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "ep_struct_sizes": ([_P, _P, _P], None),
    "ep_window_bytes": ([_P, _P], ctypes.c_uint64),
    "ep_window_format": ([_P, ctypes.c_uint64, _P], _I),
    "ep_window_abort": ([_P], _I),
    "ep_route": ([_P, _U, _P], _I),
    "ep_dispatch": ([_P, _U, _P], _I),
    "ep_sync": ([_P, _U, _U, _P], _I),
    "ep_expand": ([_P, _U, _P], _I),
    "ep_collect": ([_P, _U, _P], _I),
    "ep_reduce": ([_P, _U, _P], _I),
    "ep_combine": ([_P, _U, _P], _I),
    "ep_result_text": ([_I], ctypes.c_char_p),
}

# Of cuda/ep_memory.h, which GPUs alone have.
_MEMORY_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "ep_memory_create": ([ctypes.c_uint64, _P], _I),
    "ep_memory_free": ([_P], _I),
    "ep_memory_export": ([_P, _P], _I),
    "ep_memory_open": ([_P, _P], _I),
    "ep_memory_close": ([_P], _I),
    "ep_memory_reaches": ([_I, _I, _P], _I),
    "ep_versions": ([_P, _P], _I),
}


class KernelError(BaristaError):
    """A call of the kernels was refused, or CUDA failed in it."""


class Library:
    """One implementation. name: "cpu" or "cuda"; functions: those of cuda/ep.h, and on GPUs of cuda/ep_memory.h."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.functions = ctypes.CDLL(str(path))
        for function, (arguments, result) in (_SIGNATURES | (_MEMORY_SIGNATURES if name == "cuda" else {})).items():
            entry = getattr(self.functions, function)
            entry.argtypes, entry.restype = arguments, result
        sizes = (_U(), _U(), _U())
        self.functions.ep_struct_sizes(*(ctypes.byref(size) for size in sizes))
        known = tuple(map(ctypes.sizeof, (ShapeStruct, StateStruct, RankStruct)))
        if tuple(size.value for size in sizes) != known:
            raise KernelError(f"{path} has structs of other sizes than experts/expert_parallel/structs.py: {known}.")

    def call(self, name: str, *arguments: object) -> None:
        """Call a function that gives a result code. Raises KernelError with the reason."""
        result = getattr(self.functions, name)(*arguments)
        if result:
            raise KernelError(f"{name} failed: {self.functions.ep_result_text(result).decode()}.")

    def window_bytes(self, shape: ShapeStruct) -> tuple[int, OffsetsStruct]:
        """Bytes of a window and where its regions lie. Raises KernelError for a shape that the kernels do not take."""
        offsets = OffsetsStruct()
        total = self.functions.ep_window_bytes(ctypes.byref(shape), ctypes.byref(offsets))
        if not total:
            fields = ", ".join(f"{field[0]} {getattr(shape, field[0])}" for field in shape._fields_)
            raise KernelError(f"The kernels take no window of this shape: {fields}.")
        return total, offsets


@functools.cache
def cpu_library() -> Library:
    """The CPU twin, compiled if need be. Raises NoCompiler, BaristaError with the compiler's first lines."""
    command = (*compiler.find_compiler(), *_HOST_FLAGS, f"-I{SOURCES}", str(SOURCES / "ep_host.cpp"))
    built = _target("cpu", command)
    return Library("cpu", built if built.exists() else _compile(built, command))


def cuda_path() -> Path:
    """The kernels for GPUs: the installed package's, or compiled if need be.

    Raises ConfigError without nvcc, BaristaError with its first lines, CacheError when the cache cannot be written.
    """
    if not SOURCES.is_dir() and INSTALLED.exists():
        return INSTALLED
    built = _target("cuda", ())
    return built if built.exists() else _compile(built, nvcc_command(SOURCES), no_local_memory)


def install_cuda(sources: Path) -> Path:
    """Compile the kernels of a folder into the installed package, for machines without nvcc. Raises as cuda_path."""
    return _compile(INSTALLED, nvcc_command(sources), no_local_memory)


def nvcc_command(sources: Path) -> tuple[str, ...]:
    """What compiles a folder's kernels, all but the output's name. Raises ConfigError without nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise ConfigError(
            "nvcc was not found, and the GPU kernels are not built yet.",
            "Install the CUDA toolkit 12.8 or newer and put its bin/ on PATH, then run `make cuda`.",
        )
    return (nvcc, *NVCC_FLAGS, f"-I{sources}", *sorted(map(str, sources.glob("*.cu"))))


def no_local_memory(log: str) -> None:
    """A kernel that spills, or indexes an array outside of registers, is slow for no reason that its source shows."""
    frames = [line.strip() for line in log.splitlines() if "bytes stack frame" in line]
    bad = [line for line in frames if line != "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"]
    if bad or not frames:
        raise BaristaError(f"ptxas reports local memory, or nothing at all: {bad or log[:500]}")


def _compile(target: Path, command: tuple[str, ...], check: Callable[[str], None] = lambda log: None) -> Path:
    """The library appears whole or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            unfinished = Path(folder) / target.name
            done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
            log = done.stdout + done.stderr
            if done.returncode:
                raise BaristaError(f"the kernels cannot be built, `{shlex.join(command)}` failed:\n{log[:2000]}")
            check(log)
            unfinished.replace(target)
    except OSError as error:
        raise CacheError(f"the kernels cannot be written to {target.parent}: {error}.", MOVE_CACHE) from error
    return target


def _target(name: str, command: tuple[str, ...]) -> Path:
    """Where a library is or will be. That of a GPU is found without the compiler that made it."""
    digest = hashlib.sha256(repr((NVCC_FLAGS, command)).encode())
    for path in sorted(SOURCES.glob("ep*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return cache_root() / "expert_parallel" / digest.hexdigest()[:16] / f"{name}.so"
