"""Finding a compiler, building into the cache, and doing without."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
import time

import pytest
import torch

from barista.errors import BaristaError, CacheError
from experts import kernels
from experts.kernels import compiler, library, reference
from tests.kernel_variants import values


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)


def fake_compiler(folder, script: str) -> str:
    path = folder / "fake-c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_the_named_compiler_comes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "exit 0") + " -stdlib=x")
    assert compiler.find_compiler() == (str(tmp_path / "fake-c++"), "-stdlib=x")


def test_zig_stands_in_for_a_missing_compiler(no_compiler, monkeypatch):
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: name == "ziglang" or None)
    assert compiler.find_compiler()[:4] == (sys.executable, "-m", "ziglang", "c++")


def test_a_missing_compiler_is_named_with_its_remedy(no_compiler):
    with pytest.raises(compiler.NoCompiler, match="apt install g"):
        compiler.find_compiler()


def test_without_a_compiler_torch_stands_in_with_one_warning(no_compiler, monkeypatch, caplog):
    monkeypatch.setattr(library, "_library", None)
    monkeypatch.setattr(library, "_loaded", False)
    with caplog.at_level(logging.WARNING):
        assert kernels.load() == kernels.numerics_id() == "torch-reference"
        x, weight = values(3, 8), values(5, 8)
        assert torch.equal(kernels.linear(x, weight), reference.linear(x, weight))
        kernels.set_num_threads(2)
    assert len(caplog.records) == 1
    assert "pip install ziglang" in caplog.text


def test_a_library_is_compiled_once_and_another_compiler_has_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("BARISTA_CACHE", str(tmp_path / "cache"))
    script = (
        'for last; do :; done; [ "$last" = --version ] || { echo built >> "$last"; echo run >> ' + f"{tmp_path}/log; }}"
    )
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, script))
    portable = compiler.VARIANTS[-1]
    path = compiler.build(portable)
    assert path.read_text() == "built\n"
    assert compiler.build(portable) == path
    num_sources = len(list(compiler.SOURCES.glob("*.cpp")))
    assert (tmp_path / "log").read_text() == "run\n" * (num_sources + 1)
    assert [entry.name for entry in path.parent.iterdir()] == ["portable.so"]
    monkeypatch.setenv("CXX", f"{tmp_path}/fake-c++ -g")
    assert compiler.library_path(portable) != path


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86-64")
@pytest.mark.parametrize("variant", compiler.VARIANTS, ids=lambda variant: variant.name)
def test_instruction_sets_that_this_machine_lacks_are_written_in_valid_code(variant):
    if variant in compiler.runnable_variants():
        pytest.skip("it is compiled and run here")
    command = compiler.find_compiler()
    if command == compiler._ZIG:
        pytest.skip("zig names instruction sets otherwise")
    sources = [str(compiler.SOURCES / name) for name in ("dot.cpp", "tiles.cpp")]  # with all that differs between them
    done = subprocess.run(
        [*command, *compiler._FLAGS, *variant.flags, "-fsyntax-only", *sources], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_compiler_error_is_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("BARISTA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "echo no such flag >&2; exit 1"))
    with pytest.raises(BaristaError, match="no such flag"):
        compiler.build(compiler.VARIANTS[-1])


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BARISTA_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "exit 0"))
    with pytest.raises(CacheError, match="BARISTA_CACHE"):
        compiler.build(compiler.VARIANTS[-1])


def test_the_best_variant_of_the_processor_is_chosen(monkeypatch):
    flags = {"avx2", "fma", "f16c", "bmi1", "bmi2", "sse2"}
    monkeypatch.setattr(compiler, "cpu_flags", lambda: frozenset(flags))
    assert [variant.name for variant in compiler.runnable_variants()] == ["avx2", "portable"]
    monkeypatch.setattr(compiler, "cpu_flags", lambda: frozenset())
    assert [variant.name for variant in compiler.runnable_variants()] == ["portable"]


def test_numerics_id_names_sources_and_instruction_set():
    _, digest, variant = kernels.load().split("-")
    assert compiler.source_digest().startswith(digest)
    assert variant == compiler.runnable_variants()[0].name


def test_the_threads_are_those_that_the_machine_grants(monkeypatch):
    """barista.machine knows: affinity, capped by the control group's quota."""
    kernels.load()
    monkeypatch.setattr(library, "usable_cores", lambda: 5)
    functions = library.Library(compiler.runnable_variants()[0]).functions
    assert functions.bk_num_threads() == 5
    kernels.set_num_threads(3)
    assert functions.bk_num_threads() == 3
    kernels.set_num_threads(0)
    assert functions.bk_num_threads() == 5
    kernels.set_num_threads(2)


def test_idle_threads_burn_no_processor_time():
    kernels.load()
    kernels.set_num_threads(3)
    weight = values(256, 256)
    for _ in range(10):
        kernels.linear(values(20, 256), weight)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.03
    kernels.set_num_threads(2)


def test_importing_the_package_compiles_nothing(tmp_path):
    environment = {**os.environ, "BARISTA_CACHE": str(tmp_path), "CXX": "/bin/false"}
    subprocess.run([sys.executable, "-c", "import experts.kernels"], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []
