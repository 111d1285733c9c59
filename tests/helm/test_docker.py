"""The image's recipe, as far as it can be checked without a Docker engine: rules of good Dockerfiles, the pins, what
the build sees, and the steps of the builder themselves, run in a clean folder.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from experts.kernels import compiler

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
TARGETS = ("cpu", "cuda")
PREFIX = "/opt/barista"


@dataclass(frozen=True)
class Step:
    """One instruction. keyword: in capitals. text: its arguments on one line."""

    keyword: str
    text: str


@dataclass
class Stage:
    """What follows a FROM. base: an image, or another stage's name."""

    name: str
    base: str
    steps: list[Step] = field(default_factory=list)

    def texts(self, keyword: str) -> list[str]:
        return [step.text for step in self.steps if step.keyword == keyword]


def parse(text: str) -> dict[str, Stage]:
    """The stages by name, in order, with the global ARGs put in. Knows what our Dockerfile uses, and no heredocs."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    defaults: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for line in filter(str.strip, joined.splitlines()):
        keyword, _, rest = line.partition(" ")
        if keyword == "ARG" and stage is None:
            name, _, value = rest.partition("=")
            defaults[name] = value
        elif keyword == "FROM":
            rest = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], rest)
            base, _, name = rest.partition(" AS ")
            stage = stages[name] = Stage(name=name, base=base)
        else:
            assert stage is not None, line
            stage.steps.append(Step(keyword=keyword, text=re.sub(r"\s+", " ", rest.strip())))
    return stages


STAGES = parse(DOCKERFILE.read_text())


def chain(name: str) -> list[Stage]:
    """A stage and those it is made from, the image's own first."""
    stage = STAGES[name]
    return [*(chain(stage.base) if stage.base in STAGES else []), stage]


def chain_texts(name: str, keyword: str) -> list[str]:
    return [text for stage in chain(name) for text in stage.texts(keyword)]


def builder(target: str) -> str:
    """The stage whose /opt/barista the target takes."""
    (copy,) = (text for text in STAGES[target].texts("COPY"))
    source, tree, destination = copy.split()
    assert (tree, destination) == (PREFIX, PREFIX)
    return source.removeprefix("--from=")


def makefile_pin(name: str) -> str:
    match = re.search(rf"^{name}\s*:= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert match
    return match[1]


def copied() -> list[str]:
    """What the build takes from the repository."""
    return [
        source
        for stage in STAGES.values()
        for text in stage.texts("COPY")
        if not text.startswith("--from=")
        for source in text.split()[:-1]
    ]


def ignored(path: str) -> bool:
    """What docker/Dockerfile.dockerignore hides from the build: the last pattern that matches decides."""
    hidden = False
    for line in (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        names = [pattern, pattern.removeprefix("**/")]
        parts = Path(path).parts
        above = ["/".join(parts[: end + 1]) for end in range(len(parts))]
        if any(fnmatch.fnmatchcase(parent, name) for parent in above for name in names) or (
            pattern.startswith("**/") and any(fnmatch.fnmatchcase(part, names[1]) for part in parts)
        ):
            hidden = not line.startswith("!")
    return hidden


# ---- the rules


def hadolint(file: Path) -> subprocess.CompletedProcess[str]:
    command = [
        str(Path(sys.executable).with_name("hadolint")),
        "--config",
        str(ROOT / "docker/hadolint.yaml"),
        str(file),
    ]
    return subprocess.run(command, capture_output=True, text=True)


def test_hadolint_finds_nothing(tmp_path: Path):
    """Among its rules: no latest, apt packages with versions and no lists left, no ADD, no root at the end."""
    done = hadolint(DOCKERFILE)
    assert done.returncode == 0, done.stdout
    (tmp_path / "Dockerfile").write_text("FROM debian:latest\nRUN apt-get update && apt-get install vim\nUSER root\n")
    found = hadolint(tmp_path / "Dockerfile").stdout
    assert all(rule in found for rule in ("DL3007", "DL3008", "DL3009", "DL3015", "DL3002"))


def test_the_base_image_has_a_full_version_and_may_have_a_digest():
    images = {stage.base for stage in STAGES.values()} - STAGES.keys()
    assert images == {"python:3.11.14-slim-bookworm"}
    assert "${PYTHON_TAG}${PYTHON_DIGEST}" in DOCKERFILE.read_text()


def test_every_stage_serves_a_target_and_the_targets_differ_in_torch_and_the_kernels_of_gpus_alone():
    used = {stage.name for target in TARGETS for stage in (*chain(target), *chain(builder(target)))}
    assert used == STAGES.keys()
    cpu, cuda = (STAGES[builder(target)].texts("RUN") for target in TARGETS)
    assert cpu[1:] == [text for text in cuda[1:] if "experts.expert_parallel.build" not in text]
    assert len(cuda) == len(cpu) + 1
    assert cpu[0].replace("--index-url https://download.pytorch.org/whl/cpu ", "") == cuda[0]


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_runs_as_a_user_without_rights(target: str):
    assert chain_texts(target, "USER")[-1] == "1000:1000"
    after = [step for stage in chain(target) for step in stage.steps]
    user = max(index for index, step in enumerate(after) if step.keyword == "USER")
    assert {step.keyword for step in after[user:]} <= {"USER", "EXPOSE", "STOPSIGNAL", "CMD", "ENV", "COPY"}
    assert not any("--chown" in text for text in chain_texts(target, "COPY")), "its own code is not its to change"


@pytest.mark.parametrize("target", TARGETS)
def test_the_last_stage_has_no_build_tools(target: str):
    runs = " ".join(chain_texts(target, "RUN"))
    assert not re.search(r"apt|g\+\+|gcc|pip\S* install|-m venv|curl|wget", runs)
    (version,) = {re.match(r"python:(\d+\.\d+)", stage.base)[1] for stage in STAGES.values() if ":" in stage.base}
    for leftover in ("/usr/local/bin/pip*", f"python{version}/ensurepip", f"python{version}/site-packages"):
        assert leftover in runs
    assert "build" not in {stage.name for stage in chain(target)}


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_is_what_the_chart_expects(target: str):
    environment = dict(pair.split("=", 1) for text in chain_texts(target, "ENV") for pair in text.split())
    assert environment["PATH"].startswith("/opt/barista/bin:")
    assert environment["HOME"] == "/home/barista"
    assert environment["BARISTA_CACHE"] == "/var/cache/barista"
    assert chain_texts(target, "STOPSIGNAL") == ["SIGTERM"]
    assert not chain_texts(target, "ENTRYPOINT")
    assert json.loads(chain_texts(target, "CMD")[-1])[0] == "barista"


def test_nothing_is_fetched_but_packages_and_no_secret_is_asked_for():
    for stage in STAGES.values():
        for text in stage.texts("RUN"):
            assert not re.search(r"curl|wget|git clone|https?://(?!download\.pytorch\.org/)", text)
        for text in (*stage.texts("ARG"), *stage.texts("ENV"), *stage.texts("COPY")):
            assert not re.search(r"TOKEN|SECRET|PASSWORD|_KEY|\.pem|\.env", text)


def test_the_pins_are_those_of_the_makefile_and_the_version_is_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for target in TARGETS:
        runs = [text for text in STAGES[builder(target)].texts("RUN") if " install " in text]
        requirements = [run.split()[-1] for run in runs]
        assert requirements == [makefile_pin("TORCH"), "'.[traces]'", makefile_pin("MODEL")]
        assert "--no-deps" in runs[-1]
        version = project["version"]
        assert any(f'org.opencontainers.image.version="{version}"' in text for text in chain_texts(target, "LABEL"))
    assert "traces" in project["optional-dependencies"]


def test_the_build_sees_every_file_that_it_copies_and_no_other_folder():
    for source in copied():
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    for name in (".git/HEAD", ".venv/bin/python", "tests/tiny.py", "docker/Dockerfile", "tls/key.pem", "helm/barista"):
        assert ignored(name), name
    assert ignored("experts/kernels/lib/0/avx2.so")
    assert ignored("router/api/__pycache__/app.pyc")
    assert not ignored("experts/kernels/src/window.h")


def test_the_build_copies_all_packages_and_what_their_links_point_to():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    wanted = {pattern.rstrip("*") for pattern in setuptools["packages"]["find"]["include"]}
    for package in list(wanted):
        for link in (path for path in (ROOT / package).rglob("*") if path.is_symlink()):
            wanted.add(link.resolve().relative_to(ROOT).parts[0])
    assert wanted <= set(copied())


# ---- the steps


def copy_sources(folder: Path) -> None:
    """What the COPY instructions of the builder lay into its working directory."""
    for source in copied():
        path = ROOT / source
        if path.is_dir():
            shutil.copytree(path, folder / source, symlinks=True, ignore=_hidden)
        else:
            shutil.copy(path, folder / source)


def _hidden(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if ignored(str((Path(folder) / name).relative_to(ROOT)))}


def steps(prefix: Path) -> list[str]:
    """The builder's steps that install, for another place. pip is this environment's."""
    runs = [text for text in chain_texts(builder("cpu"), "RUN") if "apt-get" not in text]
    runs = [text.replace(PREFIX, str(prefix)) for text in runs]
    runs = [re.sub(r"^python ", f"{sys.executable} ", text) for text in runs]
    return [re.sub(r"^pip ", f"{sys.executable} -m pip ", text) for text in runs]


def run(command: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Image:
    """The installed tree as a pod has it: no compiler on PATH, no way to write beside it, another folder."""

    def __init__(self, prefix: Path, scratch: Path) -> None:
        self.prefix = prefix
        self.folder = scratch / "home"
        self.folder.mkdir()
        tools = scratch / "tools"
        tools.mkdir()
        for tool in ("sh", "sleep"):
            (tools / tool).symlink_to(shutil.which(tool) or "")
        self.environment = {
            "PATH": f"{prefix}/bin:{tools}",
            "HOME": str(self.folder),
            "BARISTA_CACHE": "/dev/null/no-cache",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def popen(self, *command: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.prefix / "bin" / command[0]), *command[1:]],
            cwd=self.folder,
            env={**self.environment, **more},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, text: str = "", **more: str) -> str:
        with self.popen(*command, **more) as process:
            out, err = process.communicate(text, timeout=120)
        assert process.returncode == 0, f"{command}\n{out}\n{err}"
        return out

    def files(self) -> list[Path]:
        return sorted(self.prefix.rglob("*"))


def numerics() -> str:
    return f"kernels-{compiler.source_digest()[:8]}-{compiler.runnable_variants()[0].name}"


@pytest.mark.long
def test_the_installed_tree_serves_without_a_compiler_and_without_writing(tmp_path: Path):
    """The builder's own commands, but for what takes minutes: this environment lends its packages, and a compiler that
    hands out a library compiled before stands in for the real one.
    """
    prefix, source = tmp_path / "opt", tmp_path / "src"
    source.mkdir()
    copy_sources(source)
    venv, _, install, _, kernels, bytecode = steps(prefix)
    assert "--index-url" not in install
    run(venv, source)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(prefix), "platbase": str(prefix)}))
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(install.replace(" install ", " install --quiet --no-deps --no-build-isolation "), source)
    library = compiler.build(compiler.runnable_variants()[0])
    stand_in = tmp_path / "c++"
    stand_in.write_text(f'#!/bin/sh\nfor last; do :; done\n[ "$last" = --version ] || cp {library} "$last"\n')
    stand_in.chmod(0o755)
    run(kernels, source, CXX=str(stand_in))
    assert {path.stem for path in packages.rglob("*.so")} == {known.name for known in compiler.compilable_variants()}
    assert not list(source.rglob("*.so")), "the kernels belong to the installed package, not to the sources"
    run(bytecode, source)
    assert list(packages.glob("barista/__pycache__/*.pyc"))
    shutil.rmtree(source)

    image = Image(prefix, tmp_path)
    before = image.files()
    script = "from experts import kernels; print(kernels.load(), kernels.__file__)"
    numerics_id, file = image.run("python", "-c", script).split()
    assert numerics_id == numerics()
    assert Path(file).is_relative_to(prefix)
    assert "house-blend" in image.run("barista", "models", BARISTA_CACHE=str(tmp_path / "cache"))
    assert image.files() == before


@pytest.mark.long
def test_the_whole_build_makes_a_tree_that_answers(tmp_path: Path):
    """Every step of the cpu target's builder but apt-get, in order; PyTorch from wherever pip is told to find it."""
    prefix, source = tmp_path / "opt", tmp_path / "src"
    source.mkdir()
    copy_sources(source)
    for step in steps(prefix):
        run(re.sub(r"--index-url \S+ ", "", step), source, PIP_NO_COMPILE="1")
    shutil.rmtree(source)

    image = Image(prefix, tmp_path)
    before = image.files()
    cache = {"BARISTA_CACHE": str(tmp_path / "cache")}
    image.run("barista", "models", "--prepare", "house-blend", **cache)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with image.popen("barista", "serve", "--port", str(port), **cache) as server:
        try:
            for _ in range(300):
                time.sleep(0.2)
                try:
                    if httpx.get(f"{url}/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    assert server.poll() is None
            command = ("barista", "chat", "--url", url, "--temperature", "0", "--max-tokens", "8")
            assert image.run(*command, text="What is the capital of France?\n").strip()
        finally:
            server.terminate()
            _, err = server.communicate(timeout=60)
    assert server.returncode == 0
    assert "not used" not in err
    assert image.files() == before
