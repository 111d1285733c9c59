"""What the chart renders, really run: head, two workers, deployer and router as processes of their own networks.

The pods' commands, environment, Secrets, mounts, probes and hooks are the rendered ones of the values for a laptop's
cluster, in static mode; the model cache is this machine's. A Kubernetes API server of the tests' own stands for the
real one, and the test does what its controllers would: it makes pods and tells their addresses.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from barista.cache import cache_root
from barista.v1.router_pb2 import Chat, ChatMessage, GenerateRequest
from barista.v1.router_pb2_grpc import RouterStub
from tests.distributed.certificates import certificates
from tests.helm.api_server import ApiServer, Request, Tls
from tests.helm.pods import Cluster, Network, Pod
from tests.helm.render import FULLNAME, NAMESPACE, render

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
START_SECONDS = 240.0  # on a busy machine
GATE = "barista.dev/experts-loaded"
TOKEN = "of-a-service-account"
ACTOR_LOGS = "/tmp/ray/session_latest/logs/worker-*.err"
STREAMS = 3
PROMPTS = tuple(f"Tell me about the number {number} and about coffee." for number in range(STREAMS))
ANSWER_TOKENS = 40


class Release:
    """The rendered release, running."""

    def __init__(self, cluster: Cluster, api: ApiServer) -> None:
        self.cluster = cluster
        self.api = api
        self.pods: dict[str, Pod] = {}
        api.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        for item in cluster.documents:
            if item["kind"] in ("Service", "StatefulSet", "Deployment"):
                api.put(item)

    def make(self, name: str, kind: str, workload: str) -> Pod:
        """A pod of a rendered workload, not started yet; the API server knows it."""
        pod = Pod(self.cluster, name, self.cluster.find(kind, workload)["spec"]["template"])
        self.pods[name] = pod
        owner = self.api.get(kind, workload, NAMESPACE)
        self.api.put(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": name,
                    "namespace": NAMESPACE,
                    "labels": pod.labels,
                    "annotations": pod.annotations,
                    "ownerReferences": [
                        {
                            "apiVersion": "apps/v1",
                            "kind": kind,
                            "name": workload,
                            "uid": owner["metadata"]["uid"],
                            "controller": True,
                        }
                    ],
                },
                "spec": pod.spec,
                "status": {"phase": "Running", "podIP": pod.address, "conditions": []},
            }
        )
        return pod

    def remove(self, name: str) -> None:
        """The pod has gone."""
        self.pods.pop(name)
        self.api.delete("Pod", name, NAMESPACE)

    @property
    def router(self) -> Pod:
        return self.pods[f"{FULLNAME}-router"]

    def gate(self, name: str) -> str:
        """The status of a pod's readiness gate; empty while it has never been set."""
        conditions = self.api.get("Pod", name, NAMESPACE)["status"].get("conditions") or []
        return next((condition["status"] for condition in conditions if condition["type"] == GATE), "")

    def logs(self) -> str:
        """The end of what every pod, and every actor on the head, has written."""
        actors = self.pods[f"{FULLNAME}-head-0"].exec(["sh", "-c", f"tail -n 20 {ACTOR_LOGS}"]).stdout
        pods = "\n".join(f"----- {name}\n{pod.log()[-1500:]}" for name, pod in self.pods.items())
        return f"{pods}\n{actors}"

    def until(self, condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not {what} within {seconds:g} s\n{self.logs()}"
            for name, pod in self.pods.items():
                assert pod.running(), f"{name} has ended\n{pod.log()[-3000:]}"
            time.sleep(0.2)

    def client(self) -> openai.OpenAI:
        key = self.cluster.secret(f"{FULLNAME}-auth")["api_keys"].decode()
        return openai.OpenAI(base_url=f"http://{self.router.address}:8000/v1", api_key=key, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    folder = tmp_path_factory.mktemp("pods")
    with Network().up() as network:
        tls = certificates(folder / "tls", f"localhost,IP:{network.address}")
        api = ApiServer(host=network.address, tls=Tls(tls / "cert.pem", tls / "key.pem", tls / "ca.pem"), token=TOKEN)
        api.start()
        cluster = Cluster(
            network,
            folder,
            render("cpu.yaml"),
            # As the kubelet does it in every pod.
            environ={"KUBERNETES_SERVICE_HOST": network.address, "KUBERNETES_SERVICE_PORT": str(api.port)},
            host_paths={"model-cache": cache_root()},
            token=TOKEN,
            ca=(tls / "ca.pem").read_bytes(),
            namespace=NAMESPACE,
        )
        running = Release(cluster, api)
        try:
            head = running.make(f"{FULLNAME}-head-0", "StatefulSet", f"{FULLNAME}-head")
            router = running.make(f"{FULLNAME}-router", "Deployment", f"{FULLNAME}-router")
            cluster.names |= {f"{FULLNAME}-head": head.address, FULLNAME: router.address}
            running.make(f"{FULLNAME}-deployer", "Deployment", f"{FULLNAME}-deployer")
            for number in range(2):
                running.make(f"{FULLNAME}-worker-{number}", "StatefulSet", f"{FULLNAME}-worker")
            with ThreadPoolExecutor() as executor:
                list(executor.map(Pod.start, running.pods.values()))
            running.until(lambda: router.probe("readinessProbe"), "ready")
            yield running
        finally:
            if request.session.testsfailed:
                print(running.logs())
            for pod in running.pods.values():
                pod.kill()
            api.stop()


def ask(client: openai.OpenAI, prompt: str, on_token: Callable[[], object] = lambda: None) -> str:
    """A greedy answer, streamed."""
    pieces = []
    for chunk in client.chat.completions.create(
        model="house-blend",
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=ANSWER_TOKENS,
        extra_body={"ignore_eos": True},
        stream=True,
    ):
        pieces.append(chunk.choices[0].delta.content or "")
        on_token()
    return "".join(pieces)


def ask_all(release: Release, meanwhile: Callable[[], object] = lambda: None) -> list[str]:
    """All prompts at once; `meanwhile` runs as soon as every answer has begun."""
    begun = [threading.Event() for _ in PROMPTS]
    with release.client() as client, ThreadPoolExecutor(STREAMS) as executor:
        answers: list[Future[str]] = [
            executor.submit(ask, client, prompt, event.set) for prompt, event in zip(PROMPTS, begun, strict=True)
        ]
        for event, answer in zip(begun, answers, strict=True):
            while not event.wait(0.2):
                if answer.done():
                    answer.result()  # raises
        meanwhile()
        return [answer.result() for answer in answers]


@pytest.fixture(scope="module")
def answers(release: Release) -> list[str]:
    """What is said while nothing happens."""
    return ask_all(release)


def test_every_probe_of_every_pod_succeeds(release: Release, answers: list[str]) -> None:
    assert all(len(answer) > 50 for answer in answers)
    for name, pod in release.pods.items():
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert pod.probe(kind), f"{kind} of {name}"


def test_the_router_says_the_same_over_grpc_to_who_has_the_key(release: Release, answers: list[str]) -> None:
    key = release.cluster.secret(f"{FULLNAME}-auth")["api_keys"].decode().strip()
    chat = Chat(messages=[ChatMessage(role="user", content=PROMPTS[0])])
    request = GenerateRequest(chat=chat, temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    with grpc.insecure_channel(f"{release.router.address}:50053") as channel:
        router = RouterStub(channel)
        replies = router.Generate(request, metadata=[("authorization", f"Bearer {key}")], timeout=120)
        assert "".join(reply.text for reply in replies) == answers[0]
        with pytest.raises(grpc.RpcError) as refused:
            list(router.Generate(request, timeout=10))
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        health = HealthStub(channel).Check(HealthCheckRequest(service="barista.v1.Router"), timeout=10)
        assert health.status == HealthCheckResponse.SERVING


def test_the_pods_own_test_gets_an_answer(release: Release) -> None:
    test = next(item for item in release.cluster.documents if item["kind"] == "Pod")
    pod = Pod(release.cluster, "test-chat", test)
    try:
        pod.start()
        status = pod.wait(120)
        assert status == 0, pod.log()
        assert pod.log().strip()
    finally:
        pod.kill()


def test_a_ray_job_runs_with_a_working_directory(release: Release, tmp_path: Path) -> None:
    (tmp_path / "experiment.py").write_text("import barista, ray; ray.init(); print('barista', barista.__version__)")
    token = release.cluster.secret(f"{FULLNAME}-auth")["auth_token"].decode()
    head = release.pods[f"{FULLNAME}-head-0"].address
    submit = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", f"http://{head}:8265"]
    done = subprocess.run(
        [*submit, "--working-dir", str(tmp_path), "--", "python", "experiment.py"],
        env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "barista 0." in done.stdout


def test_a_workers_pod_that_is_replaced_costs_no_stream(release: Release, answers: list[str]) -> None:
    name = f"{FULLNAME}-worker-1"
    release.until(lambda: release.gate(name) == "True", "loaded")
    refusals: list[str] = []
    stopped: list[subprocess.CompletedProcess[str] | None] = []

    def stop() -> None:
        stopped.append(release.pods[name].stop())
        release.remove(name)
        if not release.router.probe("readinessProbe"):
            refusals.append(release.router.refusal)

    assert ask_all(release, stop) == answers
    (hook,) = stopped
    assert hook is not None
    assert hook.returncode == 0, hook.stdout + hook.stderr
    assert "draining worker-" in hook.stdout
    assert not refusals
    # The StatefulSet makes another one of the same name, with another address.
    release.make(name, "StatefulSet", f"{FULLNAME}-worker").start()
    assert release.gate(name) in ("", "False")
    release.until(lambda: release.gate(name) == "True", "loaded again")
    assert ask_all(release) == answers


@pytest.mark.long
def test_a_workers_pod_that_is_lost_costs_no_stream(release: Release, answers: list[str]) -> None:
    name = f"{FULLNAME}-worker-0"

    def lose() -> None:
        release.pods[name].kill()
        release.remove(name)

    assert ask_all(release, lose) == answers
    release.make(name, "StatefulSet", f"{FULLNAME}-worker").start()
    release.until(lambda: release.gate(name) == "True", "loaded again")


@pytest.mark.long
def test_an_upgrade_of_the_engines_settings_costs_no_stream(release: Release, answers: list[str]) -> None:
    name, head = f"{FULLNAME}-deployer", release.pods[f"{FULLNAME}-head-0"]
    upgraded = next(
        item
        for item in render("cpu.yaml", "engine.maxNumSeqs=9", "engine.drainTimeout=2")
        if (item["kind"], item["metadata"]["name"]) == ("Deployment", name)
    )

    def engines() -> str:
        return head.exec(["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"]).stdout

    assert "--max-num-seqs 9" not in engines()

    def upgrade() -> None:
        release.pods[name].stop()
        release.pods[name] = Pod(release.cluster, name, upgraded["spec"]["template"])
        release.pods[name].start()

    assert ask_all(release, upgrade) == answers
    release.until(lambda: "router.engine" in engines() and "--max-num-seqs 9" in engines(), "upgraded")
    assert ask_all(release) == answers


def test_nothing_was_asked_of_the_api_server_that_the_roles_do_not_allow(release: Release) -> None:
    """All pods share a token here, so the union of the Roles is what may be asked; test_chart_* look at each."""
    rules = [rule for item in release.cluster.documents if item["kind"] == "Role" for rule in item["rules"]]
    asked = [request for request in release.api.requests if request.token == TOKEN]
    assert {request.resource for request in asked} >= {"endpointslices", "pods", "pods/status", "events"}
    for request in asked:
        assert any(allows(rule, request) for rule in rules), request
    # Which ones depends on where Ray has put the controller: one that died with the worker's pod starts afresh.
    release.until(lambda: bool(release.api.all("Event", NAMESPACE)), "told as an Event")


def allows(rule: dict[str, Any], request: Request) -> bool:
    """Whether a Role's rule covers a request in its namespace."""
    return (
        request.namespace == NAMESPACE
        and request.group in rule["apiGroups"]
        and request.resource in rule["resources"]
        and request.verb in rule["verbs"]
        and (not rule.get("resourceNames") or request.name in rule["resourceNames"])
    )
