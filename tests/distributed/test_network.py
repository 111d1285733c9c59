"""Two hosts, as network namespaces: the wire is chosen by itself, and a cable that is pulled ends a stream."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from experts.expert_model import ExpertModel
from tests.distributed.engines_on_workers import Load, Reference, Served, engine_on_pool, serve, survives
from tests.distributed.other_host import HOST_VARIABLE, NAMESPACE_VARIABLE
from tests.distributed.static_pool import FakeController, StaticPool, everything
from tests.distributed.workers import start_worker, tiny_expert_model

pytestmark = pytest.mark.alone

# Both ends ask after 5 s of silence, and give up after 5 s without an answer (barista.trust).
KEEPALIVE_SECONDS = 10.0
SLACK = 3.0


@dataclass(frozen=True)
class Cable:
    """Between this host and another. device: this host's end; address: the other's."""

    namespace: str
    device: str
    address: str

    def pull(self) -> None:
        _ip("link", "set", self.device, "down")

    def plug(self) -> None:
        _ip("link", "set", self.device, "up")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def cable() -> Iterator[Cable]:
    """198.18.0.0/15 is set aside for such tests (RFC 2544)."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("iproute2 and util-linux make the namespaces")
    if os.geteuid():
        pytest.skip("only root may make network namespaces")
    mark = secrets.token_hex(3)
    subnet = f"198.18.{secrets.randbelow(256)}"
    made = Cable(f"barista-{mark}", f"bar{mark}", f"{subnet}.2")
    with ExitStack() as stack:
        try:
            _ip("netns", "add", made.namespace)
            stack.callback(_ip, "netns", "del", made.namespace)
            _ip("link", "add", made.device, "type", "veth", "peer", "eth0", "netns", made.namespace)
            stack.callback(_ip, "link", "del", made.device)
            _ip("address", "add", f"{subnet}.1/24", "dev", made.device)
            _ip("-n", made.namespace, "address", "add", f"{made.address}/24", "dev", "eth0")
            _ip("-n", made.namespace, "link", "set", "eth0", "up")
            made.plug()
        except OSError as error:
            pytest.skip(f"network namespaces cannot be had here: {error}")
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ExpertModel:
    return tiny_expert_model(tmp_path_factory.mktemp("wide"), num_experts=16)


@pytest.fixture(scope="module")
def pool(cable: Cable, model: ExpertModel) -> Iterator[StaticPool]:
    """One worker here and one there, each with all experts."""
    there = {NAMESPACE_VARIABLE: cable.namespace, HOST_VARIABLE: cable.address}
    starts = [
        start_worker(model, "here"),
        start_worker(model, "there", env=there, main="tests.distributed.other_host"),
    ]
    with ExitStack() as stack:
        with ThreadPoolExecutor() as executor:  # side by side: most of a start is importing torch
            workers = list(executor.map(stack.enter_context, starts))
        made = StaticPool(model, FakeController(), {worker.name: worker for worker in workers})
        stack.callback(made.controller.stop)
        made.assign(everything(model, "here", "there"))
        yield made


def test_another_host_is_known_by_its_shared_memory(pool: StaticPool, model: ExpertModel) -> None:
    assert Path(f"/proc/{pool.workers['there'].pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    with engine_on_pool(pool, "auto") as on:
        assert (on.link("here").transport, on.link("there").transport) == ("shm", "grpc")

        def script(load: Load) -> None:
            load.wait_steps(50)
            assert on.rows("here") > 0
            assert on.rows("there") > 0

        serve(on.engine, script).assert_same_cup(Reference(model.path))


@pytest.mark.long
def test_a_cable_that_is_pulled_ends_the_stream_and_no_request(
    pool: StaticPool, cable: Cable, model: ExpertModel
) -> None:
    def scenario() -> Served:
        with engine_on_pool(pool, "auto") as on, ExitStack() as stack:

            def script(load: Load) -> None:
                load.wait_steps(20)
                old = on.link("there")
                cable.pull()
                stack.callback(cable.plug)
                load.wait_steps(20)
                load.streams = 1
                load.wait_until(lambda: old.down, KEEPALIVE_SECONDS + SLACK)
                cable.plug()
                before = on.rows("there")
                load.wait_until(lambda: on.rows("there") > before)

            return serve(on.engine, script)

    survives(Reference(model.path), 0.5, scenario)
