"""What Helm says after an installation, and what `helm test` runs."""

from __future__ import annotations

import base64
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.helm import tools
from tests.helm.render import CHART, FULLNAME, NAMESPACE, RELEASE, Document, containers, of_kind, render

CODE = re.compile(r"^ {5}(\S.*)$", re.MULTILINE)
FROM_A_CLAIM = ("model.name=Qwen/Qwen3-30B-A3B", "modelCache.type=pvc")
KEYS = "# of the kitchen\n\nfirst-key\nsecond-key\n"


def notes(file: str, *settings: str) -> str:
    """The text below NOTES: of a dry run, for which Helm 4 asks no cluster."""
    command = [str(tools.helm("4")), "install", RELEASE, str(CHART), "--namespace", NAMESPACE, "--dry-run=client"]
    command += ["--values", str(CHART / "ci" / file), *(word for setting in settings for word in ("--set", setting))]
    environment = {**os.environ, "KUBECONFIG": "/dev/null"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("\nNOTES:\n")[2]


def test_the_next_three_steps_are_told_and_name_what_is_there():
    text = notes("cpu.yaml")
    documents = render("cpu.yaml")
    assert re.findall(r"^(\d)\. ", text, re.MULTILINE) == ["1", "2", "3"]
    names = {f"{d['kind'].lower()}/{d['metadata']['name']}" for d in documents}
    mentioned = set(re.findall(r"(?:deployment|service)/[^\s,]+", text))
    assert mentioned == {f"deployment/{FULLNAME}-router", f"service/{FULLNAME}", f"deployment/{FULLNAME}-deployer"}
    assert mentioned <= names
    assert f"secret/{FULLNAME}-auth" in names
    assert f"get secret {FULLNAME}-auth " in text
    assert f"helm test {RELEASE} --namespace {NAMESPACE}" in text


def test_the_commands_are_a_shells():
    for command in CODE.findall(notes("cpu.yaml")):
        assert subprocess.run(["sh", "-n", "-c", command], check=False).returncode == 0, command


def test_the_key_command_takes_the_first_key(tmp_path: Path):
    (command,) = (line for line in CODE.findall(notes("cpu.yaml")) if "BARISTA_API_KEY=" in line)
    stand_in = tmp_path / "kubectl"
    stand_in.write_text(f"#!/bin/sh\nprintf %s {base64.b64encode(KEYS.encode()).decode()}\n")
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = f"{command}; echo $BARISTA_API_KEY"
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "first-key\n"


@pytest.mark.parametrize(
    ("file", "settings", "said"),
    [
        ("cpu.yaml", (), None),
        ("gpu.yaml", (), "device is cuda"),
        ("cpu.yaml", ("workers.runtimeClassName=nvidia",), "device is cpu, but"),
        ("cpu.yaml", ("workers.replicas=0", "model.inspect=null"), "workers.replicas is 0"),
        ("cpu.yaml", ("workers.replicas=1",), "one worker"),
        ("cpu.yaml", ("router.replicas=0",), "router.replicas is 0"),
        ("cpu.yaml", ("model.name=Qwen/Qwen3-30B-A3B",), "modelCache.type is emptyDir"),
        ("cpu.yaml", (*FROM_A_CLAIM, "model.inspect=null"), "model.inspect is empty"),
        ("cpu.yaml", FROM_A_CLAIM, None),
        ("cpu.yaml", ("router.service.type=LoadBalancer",), "no ipBlock"),
        ("cpu.yaml", ("router.ingress.enabled=true",), "no TLS"),
        ("cpu.yaml", ("networkPolicy.enabled=false",), "networkPolicy.enabled is false"),
        ("cpu.yaml", ("kubernetes.enabled=false",), "kubernetes.enabled is false"),
    ],
)
def test_what_is_unwise_is_said_once(file: str, settings: tuple[str, ...], said: str | None):
    told = re.findall(r"^NOTE: (.*)$", notes(file, *settings), re.MULTILINE)
    assert len(told) == (said is not None)
    assert said is None or said in told[0]


def test_another_cluster_is_named():
    assert "on the Ray cluster at http://ray-head.ray:8265" in notes("external.yaml")


# ---- helm test


def the_test_pod() -> Document:
    (pod,) = of_kind(render("cpu.yaml"), "Pod")
    return pod


@pytest.fixture
def script() -> tuple[list[str], dict[str, str]]:
    """The test pod's command and its plain variables."""
    (container,) = containers(the_test_pod())
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    return [*container["command"], *container["args"]], variables


def test_the_pod_goes_when_it_has_passed_and_asks_the_routers_service():
    pod = the_test_pod()
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert pod["metadata"]["annotations"]["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded"
    assert pod["spec"]["restartPolicy"] == "Never"
    (container,) = containers(pod)
    url = next(variable["value"] for variable in container["env"] if variable["name"] == "URL")
    services = {d["metadata"]["name"]: d["spec"]["ports"] for d in of_kind(render("cpu.yaml"), "Service")}
    host, _, port = url.removeprefix("http://").partition(":")
    assert port in [str(entry["port"]) for entry in services[host]]


@pytest.mark.parametrize(("answer", "code", "passes"), [("Hi", 0, True), ("", 0, False), ("", 1, False)])
def test_the_script_asks_with_the_first_key_and_wants_an_answer(
    tmp_path: Path, script: tuple[list[str], dict[str, str]], answer: str, code: int, passes: bool
):
    command, variables = script
    (tmp_path / "api_keys").write_text(KEYS)
    stand_in = tmp_path / "barista"
    lines = f'cat > {tmp_path}/asked\necho "$BARISTA_API_KEY $*" > {tmp_path}/called\nprintf "{answer}"\nexit {code}\n'
    stand_in.write_text(f"#!/bin/sh\n{lines}")
    stand_in.chmod(0o755)
    command = [word.replace("/etc/barista/keys", str(tmp_path)) for word in command]
    done = subprocess.run(command, env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}, capture_output=True)
    assert (done.returncode == 0) == passes
    assert (tmp_path / "asked").read_text() == "Hello\n"
    assert (tmp_path / "called").read_text() == f"first-key chat --url {variables['URL']} --max-tokens 8\n"


def test_the_script_fails_without_a_key(tmp_path: Path, script: tuple[list[str], dict[str, str]]):
    (tmp_path / "api_keys").write_text("# none\n")
    command = [word.replace("/etc/barista/keys", str(tmp_path)) for word in script[0]]
    done = subprocess.run(command, env={"PATH": os.environ["PATH"], "URL": "http://127.0.0.1:1"}, capture_output=True)
    assert done.returncode != 0
