"""Every command line that the chart renders is one that the program takes."""

from typing import Any

import pytest
import typer

from router.cli import app
from tests.helm.render import CI_FILES, containers, named, pod_templates, render

BARISTA = typer.main.get_command(app)
# Together they set every flag.
EVERYTHING = (
    "kubernetes.nodeLabels=true",
    "model.servedName=blend",
    "model.format=int8",
    "workers.threads=2",
    "workers.memoryBytes=2000000000000",
    "workers.autoscaling.enabled=true",
    "workers.autoscaling.minReplicas=2",
    "engine.threads=2",
    "engine.maxModelLen=4096",
    "engine.maxNumSeqs=8",
    "engine.maxNumBatchedTokens=256",
    "engine.kvCacheTokens=100000",
    "tracing.endpoint=http://collector:4318",
    "tracing.ratio=0.5",
)


@pytest.fixture(autouse=True)
def _node(monkeypatch):
    """As the pod sets it."""
    monkeypatch.setenv("NODE_NAME", "node-1")


def command_lines(file: str, *settings: str) -> set[tuple[str, ...]]:
    """All of a rendering, with what runs before a container stops; shells left out."""
    found = set()
    for template in pod_templates(render(file, *settings)).values():
        for container in containers(template):
            found.add((*container["command"], *container.get("args", [])))
            stop = container.get("lifecycle", {}).get("preStop")
            if stop:
                found.add(tuple(stop["exec"]["command"]))
    return {line for line in found if line[0] in ("barista", "ray")}


def parse(line: tuple[str, ...]) -> dict[str, Any]:
    """What the program understands, without running it. Raises what it would say."""
    program, name, *arguments = line
    if program == "ray":
        from ray.scripts.scripts import cli

        commands = cli.commands
    else:
        commands = BARISTA.commands
    assert name in commands, f"{program} has no command {name}"
    return commands[name].make_context(name, arguments).params


@pytest.mark.parametrize("file", CI_FILES)
def test_every_command_line_is_taken(file):
    lines = command_lines(file)
    assert {line[:2] for line in lines} >= {("barista", "deploy"), ("barista", "serve")}
    for line in lines:
        parse(line)


def test_the_values_reach_the_program():
    lines = {line[1]: parse(line) for line in command_lines("cpu.yaml", *EVERYTHING)}
    deploy, serve = lines["deploy"], lines["serve"]
    assert deploy["worker_memory"] == 2_000_000_000_000
    assert (deploy["threads"], deploy["worker_threads"]) == (2, 2)
    assert (deploy["max_model_len"], deploy["max_num_seqs"], deploy["max_num_batched_tokens"]) == (4096, 8, 256)
    assert (deploy["group_size"], deploy["min_workers"], deploy["max_workers"]) == (1, 2, 4)
    assert (serve["served_model_id"], serve["trace_to"], serve["trace_ratio"]) == (
        "blend",
        "http://collector:4318",
        0.5,
    )
    assert (serve["port"], serve["grpc_port"]) == (8000, 50053)
    assert lines["drain"]["timeout"] == 570


def test_without_grpc_the_program_is_told_of_no_port_and_the_service_has_none():
    (serve,) = (line for line in command_lines("cpu.yaml", "router.grpc.enabled=false") if line[1] == "serve")
    assert parse(serve)["grpc_port"] is None
    ports = {
        port["name"] for port in named(render("cpu.yaml", "router.grpc.enabled=false"), "Service", "")["spec"]["ports"]
    }
    assert ports == {"http"}
    (grpc,) = (p for p in named(render("cpu.yaml"), "Service", "")["spec"]["ports"] if p["name"] == "grpc")
    assert (grpc["port"], grpc["appProtocol"]) == (50053, "kubernetes.io/h2c")


def test_a_flag_that_does_not_exist_is_noticed():
    with pytest.raises(Exception, match="No such option"):
        parse(("barista", "serve", "--no-such-flag=1"))
