"""The command line: what it prints where, and with which exit status."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

import barista
from barista.config import ServeConfig
from router import models
from router.cli import app

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "serve",
    "chat",
    "status",
    "drain",
    "scale",
    "rebalance",
    "carve",
    "models",
    "inspect",
    "precision",
    "pull",
    "bench",
)


def run(*arguments: object, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """`barista` as a process of its own, with none of the caller's BARISTA_* variables."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BARISTA_")}
    return subprocess.run(
        [sys.executable, "-m", "router.cli", *map(str, arguments)], input=stdin, capture_output=True, text=True,
        env={**inherited, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **variables}, timeout=60, check=False,
    )  # fmt: skip


def assert_fails(done: subprocess.CompletedProcess[str], status: int, *texts: str) -> None:
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for text in texts:
        assert text in done.stderr


def test_help_is_quick_and_lists_every_command() -> None:
    started = time.perf_counter()
    done = run("--help")
    assert time.perf_counter() - started < 2  # 0.2 s on a quiet machine
    for name in COMMANDS:
        assert f" {name} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "fastapi", "httpx", "huggingface_hub", "grpc", "ray")
    code = f"import sys, router.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_version_is_the_packages() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"barista {barista.__version__}\n"


def test_serve_has_a_flag_for_every_setting() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    for entry in fields(ServeConfig):
        assert (f"--{entry.name.replace('_', '-')} " in shown) or entry.name == "model"


@pytest.mark.parametrize(
    "arguments", [["serve", "--port", "x"], ["brew"], ["serve", "--prot", "1"], ["chat", "m", "--url", "u"]]
)
def test_wrong_usage_ends_with_status_2(arguments: list[str]) -> None:
    assert_fails(run(*arguments), 2)


def test_an_unknown_key_of_the_file_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text("max_num_sequences = 3")
    assert_fails(run("serve", "--config", tmp_path / "b.toml"), 1, "error: ", "max_num_sequences", "max_num_seqs")


def test_an_unknown_variable_is_an_error_without_a_traceback() -> None:
    assert_fails(run("serve", BARISTA_PROT="1"), 1, "error: environment variable BARISTA_PROT", "BARISTA_PORT")


def test_a_port_in_use_is_named_with_a_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_fails(run("serve", "--port", port), 1, f"port {port}", "--port")


def test_beyond_loopback_a_key_file_is_required() -> None:
    assert_fails(run("serve", "--host", "0.0.0.0", "--port", 0), 1, "0.0.0.0", "--api-key-file")


@pytest.mark.parametrize("flag", ["--api-key-file", "--admin-key-file"])
@pytest.mark.parametrize("content", [None, "", "# only a comment\n\n"])
def test_a_key_file_without_keys_is_refused(tmp_path: Path, flag: str, content: str | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    assert_fails(run("serve", flag, file, "--port", 0), 1, "keys")


def test_settings_of_the_workers_without_workers_are_refused_with_a_remedy() -> None:
    assert_fails(run("serve", "--transport", "grpc"), 1, "error: transport is grpc", "--workers N")


def test_a_hub_name_that_was_not_pulled_names_the_command_that_would(tmp_path: Path) -> None:
    done = run("serve", "Qwen/Qwen3-30B-A3B", "--port", 0, BARISTA_CACHE=str(tmp_path))
    assert_fails(done, 1, "barista pull Qwen/Qwen3-30B-A3B")


@pytest.mark.parametrize("command", ["serve", "inspect"])
def test_a_folder_without_a_model_is_named(tmp_path: Path, command: str) -> None:
    assert_fails(run(command, tmp_path), 1, str(tmp_path))


def test_models_as_json_is_json_alone(tmp_path: Path) -> None:
    pulled = tmp_path / "models" / "org" / "tiny"
    pulled.mkdir(parents=True)
    (pulled / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "models" / "org" / ".half.partial").mkdir()
    (tmp_path / "models" / "org" / ".half.partial" / "config.json").write_text("{}")
    listed = json.loads(run("models", "--json", BARISTA_CACHE=str(tmp_path)).stdout)
    assert [(model["name"], model["family"]) for model in listed] == [
        ("house-blend", "not carved yet"),
        ("org/tiny", "LlamaForCausalLM"),
    ]
    assert listed[1]["path"] == str(pulled)
    assert listed[1]["nbytes"] == len('{"architectures": ["LlamaForCausalLM"]}')


def test_models_shows_the_same_to_people(tmp_path: Path) -> None:
    lines = run("models", BARISTA_CACHE=str(tmp_path)).stdout.splitlines()
    assert lines[0].split() == ["NAME", "SOURCE", "FAMILY", "SIZE", "PATH"]
    assert lines[1].startswith("house-blend ")


def test_inspecting_house_blend_before_it_is_carved_names_the_command_that_carves(tmp_path: Path) -> None:
    done = run("inspect", "house-blend", BARISTA_CACHE=str(tmp_path))
    assert_fails(done, 1, "barista models --prepare house-blend")


def test_preparing_another_name_is_wrong_usage() -> None:
    assert_fails(run("models", "--prepare", "espresso"), 2, "house-blend")


@pytest.mark.parametrize("model", ["~nobody-has-this-name/x", "n" * 300, "a/" * 2500 + "b"])
@pytest.mark.parametrize("command", ["inspect", "serve"])
def test_a_model_that_no_path_can_be_is_named(tmp_path: Path, command: str, model: str) -> None:
    assert_fails(run(command, model, BARISTA_CACHE=str(tmp_path)), 1, "error: There is no model")


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "..", "no host"])
def test_a_host_that_cannot_be_is_named(tmp_path: Path, host: str) -> None:
    keys = tmp_path / "keys"
    keys.write_text("key")
    assert_fails(run("serve", "--host", host, "--api-key-file", keys), 1, "error: Cannot listen", "--host")


def test_what_the_operating_system_refuses_is_an_error_with_its_path() -> None:
    code = (
        "from pathlib import Path; from router import cli; cli.app = lambda: Path('/nowhere/x').read_text(); cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert_fails(done, 1, "error: No such file or directory: /nowhere/x")


def test_another_recipe_is_carved_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The folder's name follows both files, whatever else is in the package."""
    for name in models.RECIPE_FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"as it was")
    monkeypatch.setattr(models, "files", lambda package: tmp_path)
    before = models.recipe_digest.__wrapped__()
    assert re.fullmatch("[0-9a-f]{8}", before)
    for name in models.RECIPE_FILES:
        (tmp_path / name).write_bytes(b"changed")
        assert models.recipe_digest.__wrapped__() != before
        (tmp_path / name).write_bytes(b"as it was")
    assert models.recipe_digest.__wrapped__() == before


def test_the_cache_must_be_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("models", "--prepare", "house-blend", BARISTA_CACHE=str(tmp_path / "file"))
    assert_fails(done, 1, "error: ")
