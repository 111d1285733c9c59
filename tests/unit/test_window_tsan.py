"""The window protocol under ThreadSanitizer, with a program that it must condemn beside the one that it must not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from experts.kernels import compiler

SOURCE = Path(__file__).parents[1] / "native" / "window_tsan.cpp"
REQUESTS = "5000"


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    # ThreadSanitizer of some compilers does not find its shadow memory where addresses are randomised widely.
    plain_addresses = [setarch, "-R"] if (setarch := shutil.which("setarch")) else []
    return subprocess.run([*plain_addresses, *command], capture_output=True, text=True, check=False, timeout=60)


def build(source: Path, program: Path) -> subprocess.CompletedProcess[str]:
    # Only a memcpy that is called, and not expanded in place, is seen by ThreadSanitizer.
    flags = ("-std=c++17", "-O1", "-g", "-pthread", "-fsanitize=thread", "-fno-builtin", "-Wall", "-Wextra", "-Werror")
    return run([*compiler.find_compiler(), *flags, str(source), "-o", str(program)])


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tsan")
    trivial = folder / "trivial.cpp"
    trivial.write_text("int main() { return 0; }\n")
    try:
        built = build(trivial, folder / "trivial")
    except compiler.NoCompiler as error:
        pytest.skip(str(error))
    if built.returncode or (built := run([str(folder / "trivial")])).returncode:
        pytest.skip(f"no ThreadSanitizer here: {built.stderr[:300]}")
    built = build(SOURCE, folder / "window_tsan")
    assert built.returncode == 0, built.stderr
    return str(folder / "window_tsan")


def test_the_window_protocol_has_no_data_race(program):
    done = run([program, REQUESTS])
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{REQUESTS} requests\n")


def test_publishing_without_release_order_would_be_seen(program):
    done = run([program, REQUESTS, "relaxed"])
    assert "data race" in done.stderr
    assert done.returncode != 0
