"""barista/v1 is what `make proto` makes of proto/, and runs with every protobuf that the package allows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATOR = Path(sys.prefix) / "generator"  # where `make test` installs it
PROTOS = sorted((ROOT / "proto").rglob("*.proto"))
STUBS = ROOT / "barista" / "v1"


def test_the_generated_code_is_that_of_the_definitions(tmp_path: Path) -> None:
    if not (GENERATOR / "grpc_tools").is_dir():
        pytest.skip(f"the generator is not installed in {GENERATOR}; make test installs it")
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    names = [str(proto.relative_to(ROOT / "proto")) for proto in PROTOS]
    done = subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", *outputs, *names],
        env={**os.environ, "PYTHONPATH": str(GENERATOR)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = {file.name: file.read_bytes() for file in (tmp_path / "barista" / "v1").iterdir()}
    committed = {file.name: file.read_bytes() for file in STUBS.glob("*_pb2*")}
    assert made == committed, "run: make proto"


def test_the_generated_code_asks_for_no_newer_library_than_the_lowest_that_is_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = {name: re.search(rf"^{name}>=([\d.]+)", "\n".join(project["dependencies"]), re.MULTILINE)[1]
              for name in ("protobuf", "grpcio")}  # fmt: skip
    for stub in STUBS.glob("*_pb2.py"):
        gencode = re.search(r"Protobuf Python Version: ([\d.]+)", stub.read_text(encoding="utf-8"))[1]
        assert version(gencode) <= version(lowest["protobuf"])
    for stub in STUBS.glob("*_pb2_grpc.py"):
        gencode = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", stub.read_text(encoding="utf-8"))[1]
        assert version(gencode) <= version(f"{lowest['grpcio']}.0")


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


@pytest.mark.parametrize("proto", PROTOS, ids=lambda proto: proto.name)
def test_every_message_keeps_numbers_for_later(proto: Path) -> None:
    """A field that goes must leave its number, and one that comes must find one that nobody used."""
    text = re.sub(r"//.*", "", proto.read_text(encoding="utf-8"))
    assert re.search(r"^package barista\.v1;$", text, re.MULTILINE)
    for body in re.findall(r"^message \w+ \{(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        assert "reserved " in body
