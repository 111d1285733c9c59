"""The kernels of cuda/*.cu on a GPU in software (tests/native/emulated): every thread of a block is a fiber."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from experts.expert_parallel.library import SOURCES, Library
from experts.kernels import compiler

EMULATED = Path(__file__).parents[1] / "native" / "emulated"
KERNELS = sorted(path for path in SOURCES.glob("ep_*.cu") if path.stem != "ep_memory")  # of which a CPU has no need


@functools.cache
def emulated_library() -> Library:
    """Skips without a C++ compiler, or where it has no fibers."""
    try:
        command = [*compiler.find_compiler(), "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra"]
    except compiler.NoCompiler as error:
        pytest.skip(str(error))
    command += ["-Werror", "-Wno-unknown-pragmas", f"-I{EMULATED}", f"-I{SOURCES}"]
    with tempfile.TemporaryDirectory() as folder:

        def compiled(source: Path) -> str:
            target = str(Path(folder) / f"{source.stem}.o")
            run([*command, "-x", "c++", "-c", str(source), "-o", target])
            return target

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, [*KERNELS, EMULATED / "emulated.cpp"]))
        library = Path(folder) / "emulated.so"
        run([*command, "-shared", *objects, "-o", str(library)])
        return Library("emulated", library)


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
