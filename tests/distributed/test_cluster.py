"""Pools of real Ray actors, kept by a real keeper: start, death, return, and nothing left behind."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.exceptions import GetTimeoutError

from barista.cache import cache_root
from barista.errors import ConfigError
from barista.trust import Trust
from barista.v1 import controller_pb2 as pb
from barista.v1.controller_pb2_grpc import ControllerStub
from experts import kernels
from experts.checkpoint import open_checkpoint
from experts.cluster.environment import keeper_environment
from experts.cluster.keeper import _answer, _cluster
from experts.cluster.messages import PoolConfig
from experts.cluster.processes import children
from experts.cluster.serving_thread import ServingThread
from experts.expert_model import ExpertModel, expert_bytes
from tests.distributed.workers import ROOT, tiny_expert_model

pytestmark = pytest.mark.alone

START_SECONDS = 60.0
END_SECONDS = 15.0


class RunningKeeper:
    """A keeper process and the test's end of its socket."""

    def __init__(self, config: PoolConfig, environment: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "experts.cluster", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdout=subprocess.PIPE,
            )
        self._sock = ours
        self._sock.settimeout(START_SECONDS)
        self._lines = ours.makefile("r")
        self._sock.sendall(config.to_json().encode() + b"\n")

    def answer(self) -> dict[str, Any]:
        """The first event that is not progress."""
        for line in self._lines:
            event: dict[str, Any] = json.loads(line)
            if event["event"] != "progress":
                return event
        raise AssertionError("the keeper said nothing")

    def hang_up(self) -> None:
        """End of file."""
        self._lines.close()
        self._sock.close()

    def family(self) -> set[int]:
        """The keeper and all of its descendants."""
        found = [self.process.pid]
        for pid in found:
            found += children(pid)
        return set(found)

    def close(self) -> None:
        """In order, then by force."""
        self.hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ExpertModel:
    return tiny_expert_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A home that is not there, and a cache that shares nothing but what is compiled."""
    kernels.load()
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "kernels").symlink_to(cache_root() / "kernels")
    own = {"HOME": str(tmp_path / "home"), "BARISTA_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | own


def pool_config(model: ExpertModel, **changes: Any) -> PoolConfig:
    sizes = expert_bytes(open_checkpoint(model.path), model)
    defaults: dict[str, Any] = {
        "pool": None,
        "workers": 2,
        "threads": 1,
        "redundancy": 1,
        "worker_memory": 1 << 20,
        "tls_dir": None,
    }
    return PoolConfig(model=model, expert_bytes=sizes, **(defaults | changes))


@contextlib.contextmanager
def keeper_of(config: PoolConfig, environment: dict[str, str]) -> Iterator[RunningKeeper]:
    keeper = RunningKeeper(config, environment)
    try:
        yield keeper
    finally:
        keeper.close()


@contextlib.contextmanager
def watching(ready: dict[str, Any]) -> Iterator[Any]:
    trust = Trust(ready["token"])

    def until(condition: Callable[[pb.PoolState], bool]) -> pb.PoolState:
        """The first state of the pool that satisfies it."""
        with trust.channel(ready["controller"]) as channel:
            watch = ControllerStub(channel).Watch(
                iter(()), metadata=trust.metadata, timeout=START_SECONDS, wait_for_ready=True
            )
            for state in watch:
                if condition(state):
                    watch.cancel()
                    return state
        raise AssertionError("the stream ended")

    yield until


def all_ready(state: pb.PoolState) -> bool:
    return state.coverage == 1 and all(worker.state == pb.WORKER_STATE_READY for worker in state.workers)


def listening_beyond_loopback(pids: set[int]) -> list[str]:
    """Whoever else on the network could speak to one of these processes."""
    found = []
    for process in map(psutil.Process, sorted(pids)):
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray starts some for a moment
            for socket_ in process.net_connections("tcp"):
                if socket_.status == psutil.CONN_LISTEN and not _is_loopback(socket_.laddr.ip):
                    found.append(f"{socket_.laddr.ip}:{socket_.laddr.port} {_command(process.pid)}")
    return found


def _is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def wait_until_gone(pids: set[int]) -> None:
    """Fails, with what is left, if they take too long. A process that nobody has waited for counts as gone."""
    deadline = time.monotonic() + END_SECONDS
    while alive := {pid: command for pid in pids if (command := _command(pid))}:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@pytest.mark.long
def test_a_killed_worker_and_controller_come_back_and_the_end_of_the_server_is_the_end_of_all(
    model: ExpertModel, environment: dict[str, str], tmp_path: Path
) -> None:
    with keeper_of(pool_config(model), environment) as keeper:
        ready = keeper.answer()
        assert ready["event"] == "ready", ready
        with watching(ready) as until:
            before = until(all_ready)
            family = keeper.family()
            assert {worker.pid for worker in before.workers} < family
            assert listening_beyond_loopback(family) == []
            victim = before.workers[0]
            os.kill(victim.pid, signal.SIGKILL)
            until(lambda state: state.workers[0].state == pb.WORKER_STATE_LOST)
            after = until(all_ready)
            assert after.workers[0].restarts == 1
            assert after.workers[0].pid != victim.pid
            assert after.workers[0].held_bytes > 0
            assert after.workers[0].capacity_bytes == victim.capacity_bytes == 1 << 20
            assert after.epoch > before.epoch
            controller = next(pid for pid in family if _command(pid).startswith("ray::ControllerActor"))
            os.kill(controller, signal.SIGKILL)
            again = until(lambda state: all_ready(state) and state.term > after.term)  # at the same address
            assert [worker.pid for worker in again.workers] == [worker.pid for worker in after.workers]
        family |= keeper.family()
        keeper.hang_up()
        assert keeper.process.wait(END_SECONDS) == 0
        wait_until_gone(family)
        assert keeper.process.stdout is not None
        assert keeper.process.stdout.read() == b""
    assert not (tmp_path / "home").exists()


@pytest.mark.long
def test_a_killed_keeper_leaves_no_process(model: ExpertModel, environment: dict[str, str]) -> None:
    with keeper_of(pool_config(model, workers=1), environment) as keeper:
        assert keeper.answer()["event"] == "ready"
        family = keeper.family()
        assert len(family) > 4
        os.kill(keeper.process.pid, signal.SIGKILL)
        wait_until_gone(family)


def test_a_ray_address_that_does_not_answer_is_refused(model: ExpertModel, environment: dict[str, str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with keeper_of(pool_config(model), environment | {"RAY_ADDRESS": address}) as keeper:
            answer = keeper.answer()
    assert answer["event"] == "fatal"
    assert address in answer["message"]
    assert "RAY_ADDRESS" in answer["remedy"]


def test_a_named_pool_needs_a_cluster_that_outlives_its_server(
    model: ExpertModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="espresso") as caught:
        _cluster(pool_config(model, pool="espresso"), "namespace")
    assert "ray start --head" in caught.value.remedy


def test_a_controller_that_ray_cannot_place_is_not_waited_for_without_end(
    model: ExpertModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(reference: object, *, timeout: float) -> None:
        raise GetTimeoutError(f"not within {timeout} s")

    monkeypatch.setattr("ray.get", never)
    with pytest.raises(ConfigError, match="of pool espresso has not answered within 30 s") as caught:
        _answer(None, pool_config(model, pool="espresso"))
    assert "ray status" in caught.value.remedy


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("failure", [RuntimeError("the loop has failed"), None])
def test_a_controller_that_ends_after_its_start_takes_its_process_along(
    restarted: bool, failure: Exception | None
) -> None:
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    async def main(serves: Callable[[], None]) -> None:
        serves()
        if failure is not None:
            raise failure

    with contextlib.suppress(RuntimeError):  # it may fail before the constructor looks
        ServingThread(main, restarted=restarted, end_process=ended.put)
    assert ended.get(timeout=END_SECONDS) == 1


def test_a_first_controller_says_why_it_cannot_start_and_a_restarted_one_is_tried_again() -> None:
    ended: list[int] = []

    async def main(serves: Callable[[], None]) -> None:
        raise ConfigError("The port is taken.")

    for restarted in (False, True):
        with pytest.raises(ConfigError, match="taken"):
            ServingThread(main, restarted=restarted, end_process=ended.append)
        assert ended == [1] * restarted


def test_what_the_user_says_of_ray_stays_and_tokens_are_used(tmp_path: Path) -> None:
    joining = {"RAY_ADDRESS": "x", "HOME": str(tmp_path)}
    assert keeper_environment(joining) == joining
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("token")
    assert keeper_environment(joining)["RAY_AUTH_MODE"] == "token"
    assert keeper_environment(joining | {"RAY_AUTH_MODE": "disabled"})["RAY_AUTH_MODE"] == "disabled"
    assert keeper_environment({"RAY_AUTH_MODE": "disabled"}).get("RAY_AUTH_TOKEN") is None
    first, second = keeper_environment({}), keeper_environment({})
    assert first["RAY_AUTH_MODE"] == "token"
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]


def test_the_order_survives_the_wire(model: ExpertModel) -> None:
    config = pool_config(model, pool="p", tls_dir="/certs")
    assert PoolConfig.from_json(config.to_json()) == config
    as_string = json.loads(config.to_json()) | {"model": model.to_json()}
    assert PoolConfig.from_json(json.dumps(as_string)) == config
