"""Programs under ThreadSanitizer, where the compiler has it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from experts.kernels import compiler

NATIVE = Path(__file__).parents[1] / "native"


def run(command: list[str], timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    # ThreadSanitizer of some compilers does not find its shadow memory where addresses are randomised widely.
    plain_addresses = [setarch, "-R"] if (setarch := shutil.which("setarch")) else []
    return subprocess.run([*plain_addresses, *command], capture_output=True, text=True, check=False, timeout=timeout)


def build(source: Path, program: Path) -> subprocess.CompletedProcess[str]:
    # Only a memcpy that is called, and not expanded in place, is seen by ThreadSanitizer.
    flags = ("-std=c++17", "-O1", "-g", "-pthread", "-fsanitize=thread", "-fno-builtin", "-Wall", "-Wextra", "-Werror")
    return run([*compiler.find_compiler(), *flags, str(source), "-o", str(program)])


def program(name: str, folder: Path) -> str:
    """tests/native/NAME.cpp, compiled into the folder. Skips where there is no ThreadSanitizer."""
    trivial = folder / "trivial.cpp"
    trivial.write_text("int main() { return 0; }\n")
    try:
        built = build(trivial, folder / "trivial")
    except compiler.NoCompiler as error:
        pytest.skip(str(error))
    if built.returncode or (built := run([str(folder / "trivial")])).returncode:
        pytest.skip(f"no ThreadSanitizer here: {built.stderr[:300]}")
    built = build(NATIVE / f"{name}.cpp", folder / name)
    assert built.returncode == 0, built.stderr
    return str(folder / name)
