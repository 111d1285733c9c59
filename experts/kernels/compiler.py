"""Compiles the C++ kernels, once per instruction set, into Barista's cache.

The cache folder's name is a digest of the sources, the flags and the compiler, so that a stale library is never loaded.
Libraries that were compiled into the installed package come first: they need neither a compiler nor the cache.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from barista.cache import cache_root
from barista.errors import BaristaError, CacheError

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
INSTALLED = Path("experts", "kernels", "lib")  # of an image, see `build_installed`

# No -ffast-math and no contraction: the order and the rounding of every sum are those of the source (src/simd.h).
_FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-ffp-contract=off", "-fPIC", "-pthread", "-w")


class NoCompiler(BaristaError):
    """There is no C++ compiler on this machine."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One instruction set.

    cpu_flags: what /proc/cpuinfo must list. flags: what GCC or Clang is given. zig_cpu: what zig is given instead; it
    would compile for the processor that it runs on, and its AVX-512 needs more than the flags say.
    """

    name: str
    cpu_flags: frozenset[str]
    flags: tuple[str, ...]
    zig_cpu: str


_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd")
_AVX2_CPU = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2"})
_AVX512_CPU = _AVX2_CPU | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}

_ZIG = (sys.executable, "-m", "ziglang", "c++")

# Best first.
VARIANTS = (
    Variant(
        "avx512bf16",
        _AVX512_CPU | {"avx512_bf16", "avx512_vnni"},
        (*_AVX512, "-mavx512bf16", "-mavx512vnni"),
        "x86_64_v4+avx512bf16+avx512vnni",
    ),
    Variant("avx512", _AVX512_CPU, _AVX512, "x86_64_v4"),
    Variant("avx2", _AVX2_CPU, _AVX2, "x86_64_v3"),
    Variant("portable", frozenset(), (), "baseline"),
)


def cpu_flags() -> frozenset[str]:
    """The instruction set extensions of this machine, as Linux names them; empty where Linux does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), frozenset())


def compilable_variants() -> tuple[Variant, ...]:
    """The variants of this machine's architecture, also those that only newer processors run."""
    return VARIANTS if platform.machine() == "x86_64" else VARIANTS[-1:]


def runnable_variants() -> tuple[Variant, ...]:
    """The variants that this machine can run, best first. The last one runs anywhere."""
    here = cpu_flags()
    return tuple(variant for variant in VARIANTS if variant.cpu_flags <= here)


@functools.cache
def source_digest() -> str:
    """Hexadecimal digest of the kernels' sources and common flags."""
    digest = hashlib.sha256(repr(_FLAGS).encode())
    for path in sorted(SOURCES.glob("[!.]*.[ch]*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def find_compiler() -> tuple[str, ...]:
    """The command of a C++ compiler: $CXX, or the first of c++, g++, clang++, or zig from the package `ziglang`.

    Raises NoCompiler.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for command in (named, ["c++"], ["g++"], ["clang++"]):
        if command and (found := shutil.which(command[0])):
            return (found, *command[1:])
    if importlib.util.find_spec("ziglang"):
        return _ZIG
    raise NoCompiler(
        "no C++ compiler was found ($CXX, c++, g++, clang++, the Python package ziglang).",
        "Install one: `apt install g++`, or `pip install ziglang`.",
    )


@functools.cache
def _compiler_version(compiler: tuple[str, ...]) -> bytes:
    return subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout


def library_path(variant: Variant) -> Path:
    """Where this variant's library is, or will be when it has been built. Raises NoCompiler."""
    compiler = find_compiler()
    return cache_root() / "kernels" / _digest(compiler, _compiler_version(compiler)) / f"{variant.name}.so"


def installed_path(variant: Variant) -> Path:
    """Where this variant's library is if it was compiled into the installed package, by whatever compiler.

    That package may be hidden by the working directory of a Ray job, a checkout: its library serves equal sources.
    """
    name = INSTALLED / _digest() / f"{variant.name}.so"
    places = (Path(entry) / name for entry in sys.path)
    return next((place for place in places if place.exists()), Path(__file__).parents[2] / name)


def _digest(*compiler: object) -> str:
    """Of all that the libraries' code depends on."""
    flags = [(known.name, known.flags) for known in VARIANTS]
    return hashlib.sha256(repr((source_digest(), flags, platform.machine(), *compiler)).encode()).hexdigest()[:16]


def build(variant: Variant) -> Path:
    """Compile one variant unless the installed package or the cache has it; its path.

    Raises NoCompiler, CacheError when the cache cannot be written, and BaristaError with the compiler's first lines.
    """
    if (installed := installed_path(variant)).exists():
        return installed
    target = library_path(variant)
    if target.exists():
        return target
    logger.warning("compiling the CPU kernels (%s), once", variant.name)
    try:
        _compile_into(target, variant)
    except OSError as error:
        raise CacheError(
            f"the compiled kernels cannot be written to {target.parent}: {error}.",
            "Free some space there, or point BARISTA_CACHE to a folder that can be written.",
        ) from error
    return target


def build_installed(variant: Variant) -> Path:
    """Compile one variant into the installed package, where it serves machines that have no compiler; its path.

    Raises NoCompiler, OSError when the package's folder cannot be written, and BaristaError as `build` does.
    """
    target = installed_path(variant)
    if not target.exists():
        _compile_into(target, variant)
    return target


def _compile_into(target: Path, variant: Variant) -> None:
    """The library appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        unfinished = Path(folder) / target.name
        _compile(find_compiler(), variant, unfinished)
        unfinished.replace(target)


def _compile(compiler: tuple[str, ...], variant: Variant, output: Path) -> None:
    flags, link_flags = variant.flags, variant.flags
    if compiler == _ZIG:
        # zig builds its own C++ library for each processor that it links for; one of them is enough.
        flags, link_flags = (f"-mcpu={variant.zig_cpu}",), ("-mcpu=baseline",)

    def compile_one(source: Path) -> str:
        target = str(output.with_suffix(f".{source.stem}.o"))
        _run((*compiler, *_FLAGS, *flags, "-c", str(source), "-o", target))
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sorted(SOURCES.glob("*.cpp"))))
    _run((*compiler, "-shared", "-fPIC", "-pthread", *link_flags, *objects, "-o", str(output)))


def _run(command: tuple[str, ...]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BaristaError(
            f"the CPU kernels cannot be built, `{shlex.join(command)}` failed:\n{done.stderr[:2000]}",
            "Name a C++17 compiler in CXX (GCC 12 or Clang 15 and later work).",
        )
