"""Real worker processes: rows, refusals, deaths, trust."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from barista.errors import ConfigError
from barista.trust import Trust
from experts import kernels
from experts.attach import CallFailed, Hello, WorkerClient, _greet, _offer, attach
from experts.checkpoint import open_checkpoint
from experts.expert_model import ExpertModel
from experts.expert_weights import ExpertReader
from experts.link import Link, LinkDown, RowsRequest, RowsStatus
from experts.numerics import numerics_id
from experts.transport.grpc import ExchangeStream
from experts.worker.server import WorkerServer
from tests.distributed.certificates import certificates
from tests.distributed.workers import ROOT, TRUST, RunningWorker, start_worker, start_workers, tiny_expert_model

ALL = [(layer, expert) for layer in (0, 1) for expert in range(4)]
LOAD_SECONDS = 10.0


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ExpertModel:
    return tiny_expert_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def workers(model) -> Iterator[list[RunningWorker]]:
    """Two workers that outlive the tests of this module; each test leaves both holding every expert."""
    with start_workers(model, "worker-0", "worker-1") as running:
        for worker in running:
            assign(worker, ALL)
        yield running


@pytest.fixture
def victim(model) -> Iterator[RunningWorker]:
    """A worker that may be hurt."""
    with start_worker(model, "worker-7") as worker:
        assign(worker, ALL)
        yield worker


def client(worker: RunningWorker) -> WorkerClient:
    return WorkerClient(worker.address, TRUST)


def assign(worker: RunningWorker, keys, **told: int) -> None:
    for _ in client(worker).assign(keys, **told):
        pass


def hello(model: ExpertModel, **changes) -> Hello:
    dtype = getattr(torch, model.dtype)
    return dataclasses.replace(
        Hello(engine_id="test", model=model, numerics_id=numerics_id(dtype), max_rows=32), **changes
    )


def request(step: int, layer: int, x: torch.Tensor, ids: list[list[int]]) -> RowsRequest:
    array = np.array(ids, np.int32)
    return RowsRequest(step, layer, 0, 0, x, np.arange(len(ids), dtype=np.int32), array, int((array != -1).sum()))


def ask(link: Link, ids: list[list[int]], layer: int = 0, step: int = 0):
    link.send(request(step, layer, torch.ones(len(ids), 32), ids))
    return link.receive(time.monotonic() + LOAD_SECONDS)


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def served_here(model: ExpertModel, trust: Trust = TRUST, capacity: int = 1 << 30) -> Iterator[WorkerServer]:
    """A worker in this process, where nothing dies: saves importing torch once more."""
    server = WorkerServer(model, "worker-0", "127.0.0.1", 0, 1, capacity, trust)
    try:
        yield server
    finally:
        server.stop(0)
        kernels.set_num_threads(2)
        torch.set_num_threads(2)


@pytest.mark.parametrize("transport", ["grpc", "auto"])
def test_rows_of_two_workers_combine_to_the_bytes_of_moe(workers, model, transport):
    check_bytes([worker.address for worker in workers], model, transport)


@pytest.mark.parametrize("transport", ["grpc", "auto"])
def test_rows_in_bfloat16_combine_to_the_bytes_of_moe(tmp_path, transport):
    model = tiny_expert_model(tmp_path / "m", "bfloat16")
    with served_here(model) as one, served_here(model) as other:
        for server in (one, other):
            for _ in server.store.assign({0: range(4), 1: range(4)}):
                pass
        check_bytes([one.address, other.address], model, transport)


def check_bytes(addresses: list[str], model: ExpertModel, transport: str) -> None:
    dtype = getattr(torch, model.dtype)
    reader = ExpertReader(open_checkpoint(model.path), dtype)
    links = [attach(address, hello(model), TRUST, transport) for address in addresses]
    try:
        assert {link.transport for link in links} == {"shm" if transport == "auto" else "grpc"}
        generator = torch.Generator().manual_seed(3)
        for step, num_tokens in enumerate((1, 2, 7, 32)):
            for layer in model.layers:
                table = kernels.ExpertTable({e: reader.read(model.layers[layer], layer, e) for e in range(4)}, 4)
                x = torch.randn(num_tokens, 32, generator=generator).to(dtype)
                ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(num_tokens)]).int()
                weights = torch.rand(num_tokens, 2, generator=generator)
                addresses, replies = np.zeros((num_tokens, 2), np.int64), []
                owner = np.array([0, 1, 0, 1], np.int32)
                parts = [kernels.split(ids, owner, number) for number in range(2)]
                for link, (tokens, part, num_pairs) in zip(links, parts, strict=True):
                    if num_pairs:
                        link.send(RowsRequest(step, layer, 0, 0, x, tokens, part, num_pairs))
                for link, (tokens, part, num_pairs) in zip(links, parts, strict=True):
                    if num_pairs:
                        reply = link.receive(time.monotonic() + LOAD_SECONDS)
                        replies.append(reply)
                        kernels.place_rows(addresses, tokens, part, reply.address, 32 * dtype.itemsize)
                rows, failed = kernels.combine_rows(addresses, weights, 32, dtype)
                wanted, _ = kernels.moe(x, ids, weights, table)
                assert not failed.any()
                assert torch.equal(rows, wanted)
    finally:
        for link in links:
            link.close()


def test_shared_memory_has_no_name_once_both_ends_have_it(workers, model):
    before = set(Path("/dev/shm").iterdir())
    link = attach(workers[0].address, hello(model), TRUST, "shm")
    try:
        mine = f"barista-{os.getpid()}-"
        assert not [path for path in set(Path("/dev/shm").iterdir()) - before if path.name.startswith(mine)]
        assert ask(link, [[0, 1]]).status is RowsStatus.OK
    finally:
        link.close()


def test_a_worker_takes_the_name_of_a_window_away_by_itself(workers, model):
    """So that an engine that is killed right after the offer leaves nothing behind."""
    window, _ = _offer(hello(model))
    stream = ExchangeStream(workers[0].address, TRUST)
    try:
        assert _greet(stream, hello(model), window).window_accepted
        assert not (Path("/dev/shm") / window.name).exists()
    finally:
        window.unlink()
        stream.close()


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_a_closed_link_leaves_no_thread_though_its_worker_is_stopped(workers, model, transport):
    link = attach(workers[1].address, hello(model), TRUST, transport)
    with workers[1].stopped():
        link.close()
        assert not [thread for thread in threading.enumerate() if thread.name == f"exchange {workers[1].address}"]


def test_describe_says_what_is_held_and_how_much_was_served(workers, model):
    link = attach(workers[0].address, hello(model), TRUST, "grpc")
    before = client(workers[0]).describe()
    ask(link, [[0, 1]])
    link.close()
    after = client(workers[0]).describe()
    assert [(item.layer, item.expert) for item in after.held] == ALL
    assert all(len(item.digest) == 16 for item in after.held)
    assert after.held_bytes == 8 * 3 * 32 * 16 * 4
    assert after.dispatches == before.dispatches + 1
    assert (after.pid, after.name, after.model_digest) == (workers[0].pid, "worker-0", model.digest)
    assert after.numerics_id == numerics_id(torch.float32)


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_an_expert_that_is_not_held_is_named(workers, model, transport):
    client(workers[1]).release([(0, 2), (0, 3)])
    link = attach(workers[1].address, hello(model), TRUST, transport)
    try:
        reply = ask(link, [[0, 2], [3, 2]])
        assert (reply.status, reply.not_held) == (RowsStatus.NOT_HELD, (2, 3))
        assert ask(link, [[0, 1]]).status is RowsStatus.OK
    finally:
        link.close()
        assign(workers[1], ALL)


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_experts_come_and_go_under_traffic(workers, model, transport):
    """Each answer is right or NOT_HELD: what is held all the time is always answered."""
    link = attach(workers[1].address, hello(model), TRUST, transport)
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            client(workers[1]).release([(0, 3)])
            assign(workers[1], [(0, 3)])

    changer = threading.Thread(target=change)
    changer.start()
    try:
        seen = set()
        deadline = time.monotonic() + LOAD_SECONDS
        while len(seen) < 2 and time.monotonic() < deadline:
            seen.add(ask(link, [[1, 3]]).status)
            assert ask(link, [[0, 1]]).status is RowsStatus.OK
        assert seen == {RowsStatus.OK, RowsStatus.NOT_HELD}
    finally:
        stop.set()
        changer.join()
        link.close()
        assign(workers[1], ALL)


def test_several_engines_are_served_side_by_side(workers, model):
    links = [attach(workers[0].address, hello(model), TRUST, wire) for wire in ("grpc", "shm", "grpc", "shm")]
    try:
        for step in range(5):
            for link in links:
                link.send(request(step, 0, torch.ones(1, 32), [[0, 1]]))
            assert {link.receive(time.monotonic() + LOAD_SECONDS).step for link in links} == {step}
    finally:
        for link in links:
            link.close()


def test_a_probe_is_the_row_of_expert_rows(workers, model):
    row = torch.randn(32, generator=torch.Generator().manual_seed(5))
    reader = ExpertReader(open_checkpoint(model.path), torch.float32)
    table = kernels.ExpertTable({2: reader.read(model.layers[1], 1, 2)}, 4)
    wanted = kernels.expert_rows(row[None], torch.tensor([[2]], dtype=torch.int32), table)
    assert torch.equal(client(workers[0]).probe(1, 2, row), wanted[0])


def test_commands_that_make_no_sense_are_refused_by_code(workers):
    worker = client(workers[0])
    codes = grpc.StatusCode
    for code, command in (
        (codes.INVALID_ARGUMENT, lambda: worker.probe(0, 0, torch.ones(31))),
        (codes.INVALID_ARGUMENT, lambda: worker.probe(9, 0, torch.ones(32))),
        (codes.INVALID_ARGUMENT, lambda: worker.release([(0, 4)])),
        (codes.INVALID_ARGUMENT, lambda: list(worker.assign([(2, 0)]))),
    ):
        with pytest.raises(CallFailed) as caught:
            command()
        assert caught.value.code is code


def test_fences_capacity_and_lost_experts_are_refused_by_code(model):
    with served_here(model, capacity=2 * 3 * 32 * 16 * 4) as server:
        worker = WorkerClient(server.address, TRUST)
        list(worker.assign([(0, 0)], term=2, epoch=1))
        for code, text, command in (
            (grpc.StatusCode.FAILED_PRECONDITION, "term 2", lambda: list(worker.assign([(0, 1)], term=1))),
            (grpc.StatusCode.FAILED_PRECONDITION, "term 2", lambda: worker.release([(0, 0)], term=1)),
            (grpc.StatusCode.RESOURCE_EXHAUSTED, "6,144 bytes are missing", lambda: list(worker.assign(ALL[1:3]))),
            (grpc.StatusCode.NOT_FOUND, "not held", lambda: worker.probe(0, 3, torch.ones(32))),
        ):
            with pytest.raises(CallFailed, match=text) as caught:
                command()
            assert caught.value.code is code
        assert [(item.layer, item.expert) for item in worker.describe().held] == [(0, 0)]


def test_a_worker_that_stops_while_it_loads_is_not_waited_for_without_end(workers, monkeypatch):
    monkeypatch.setattr("experts.attach.STALL_SECONDS", 0.2)
    with workers[1].stopped(), pytest.raises(CallFailed, match=r"no expert was loaded within 0\.2 s") as caught:
        assign(workers[1], ALL)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_checkpoint_that_has_changed_is_data_loss(tmp_path):
    model = tiny_expert_model(tmp_path / "m")
    wide = dataclasses.replace(
        model, layers={layer: dataclasses.replace(spec, intermediate_size=17) for layer, spec in model.layers.items()}
    )
    with served_here(wide) as server, pytest.raises(CallFailed, match="has shape") as caught:
        list(WorkerClient(server.address, TRUST).assign([(0, 0)]))
    assert caught.value.code is grpc.StatusCode.DATA_LOSS


def test_draining_is_said_to_whoever_asks_for_health_and_rows_are_computed_all_the_same(workers, model):
    def health() -> int:
        with TRUST.channel(workers[0].address) as channel:
            ask_health = health_pb2_grpc.HealthStub(channel).Check
            return ask_health(health_pb2.HealthCheckRequest(), metadata=TRUST.metadata).status

    serving = health_pb2.HealthCheckResponse
    assert health() == serving.SERVING
    client(workers[0]).drain()
    assert health() == serving.NOT_SERVING
    assert client(workers[0]).describe().draining
    link = attach(workers[0].address, hello(model), TRUST)
    assert ask(link, [[0, 1]]).status is RowsStatus.OK
    link.close()
    client(workers[0]).drain(False)
    assert health() == serving.SERVING


def test_a_killed_worker_takes_its_links_down_while_we_wait(victim, model):
    links = [attach(victim.address, hello(model), TRUST, transport) for transport in ("grpc", "shm")]
    with victim.stopped():
        for link in links:
            link.send(request(0, 0, torch.ones(1, 32), [[0, 1]]))
        killer = threading.Timer(0.1, victim.process.kill)
        killer.start()
        started = time.monotonic()
        for link in links:
            with pytest.raises(LinkDown):
                link.receive(started + 30)
            assert link.down
        assert time.monotonic() - started < 5
        killer.join()
    for link in links:
        link.close()


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_a_stopped_worker_is_late_and_its_answer_has_its_own_tag(workers, model, transport):
    link = attach(workers[1].address, hello(model), TRUST, transport)
    try:
        with workers[1].stopped():
            link.send(request(41, 0, torch.ones(1, 32), [[0, 1]]))
            assert link.receive(time.monotonic() + 0.1) is None
            assert link.outstanding == 1
        assert link.receive(time.monotonic() + LOAD_SECONDS).step == 41
        assert ask(link, [[0, 1]], step=42).step == 42
    finally:
        link.close()


def test_what_differs_is_refused_with_both_values_and_a_remedy(workers, model, monkeypatch):
    other = dataclasses.replace(model, digest=bytes(16))
    more = dataclasses.replace(model, top_k=3)
    half = dataclasses.replace(model, dtype="bfloat16")
    for said, values in (
        (hello(model, numerics_id="kernels-of-old"), ("kernels-of-old", numerics_id(torch.float32))),
        (hello(other), (bytes(16).hex(), model.digest.hex(), str(model.path))),
        (hello(more), ("is 3", "is 2")),
        (hello(half, numerics_id=numerics_id(torch.float32)), ("row dtype", "--format")),
    ):
        with pytest.raises(LinkDown, match="FAILED_PRECONDITION") as caught:
            attach(workers[0].address, said, TRUST, "grpc")
        for value in values:
            assert value in str(caught.value)
    monkeypatch.setattr("experts.attach.PROTOCOL_VERSION", 77)
    with pytest.raises(LinkDown, match=r"protocol version is 77, that of worker-0 is 1.*same Barista"):
        attach(workers[0].address, hello(model), TRUST, "grpc")


def test_a_malformed_message_ends_its_own_stream_alone(workers, model):
    links = [attach(workers[0].address, hello(model), TRUST, "grpc") for _ in range(2)]
    try:
        links[0].send(request(0, 0, torch.ones(1, 32), [[0, 4]]))  # the layer has 4 experts
        with pytest.raises(LinkDown, match="INVALID_ARGUMENT"):
            links[0].receive(time.monotonic() + LOAD_SECONDS)
        assert ask(links[1], [[0, 1]]).status is RowsStatus.OK
    finally:
        for link in links:
            link.close()


def test_a_wrong_token_is_refused_on_every_call(workers, model):
    stranger = Trust("guess")
    with pytest.raises(LinkDown, match=r"UNAUTHENTICATED.*BARISTA_POOL_TOKEN"):
        attach(workers[0].address, hello(model), stranger)
    for command in (
        WorkerClient(workers[0].address, stranger).describe,
        WorkerClient(workers[0].address, stranger).drain,
    ):
        with pytest.raises(CallFailed) as caught:
            command()
        assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
    assert not client(workers[0]).describe().draining


def test_an_address_that_is_taken_is_an_error_that_names_it(model):
    with served_here(model) as server:
        host, port = server.address.split(":")
        with pytest.raises(ConfigError, match=server.address):
            WorkerServer(model, "worker-1", host, int(port), 1, 0, TRUST)


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_a_computation_that_raises_is_answered_with_failed_and_hurts_no_other(model, transport, monkeypatch):
    with served_here(model) as server:
        server.store.tables = None  # every request comes by `compute`
        list(server.store.assign({0: range(4)}))
        link = attach(server.address, hello(model), TRUST, transport)

        def fail(*arguments: object) -> None:
            raise OSError("the disk is gone")

        try:
            monkeypatch.setattr(type(server.store), "compute", fail)
            assert ask(link, [[0, 1]]).status is RowsStatus.FAILED
            monkeypatch.undo()
            assert ask(link, [[0, 1]]).status is RowsStatus.OK
        finally:
            link.close()


def test_a_peer_that_says_nothing_is_a_link_down(model, monkeypatch):
    monkeypatch.setattr("experts.attach.ATTACH_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(LinkDown, match=f"{address} has not answered"):
            attach(address, hello(model), TRUST)


def test_nobody_there_is_a_link_down(model):
    with pytest.raises(LinkDown, match="UNAVAILABLE"):
        attach("127.0.0.1:1", hello(model), TRUST)


def test_with_tls_only_certificates_of_the_same_ca_get_through(tmp_path, model):
    ours, theirs = certificates(tmp_path / "ours"), certificates(tmp_path / "theirs")
    trust, stranger = Trust("test-token", ours), Trust("test-token", theirs)
    with served_here(model, trust) as worker:
        list(WorkerClient(worker.address, trust).assign(ALL))
        for transport in ("grpc", "shm"):
            link = attach(worker.address, hello(model), trust, transport)
            assert ask(link, [[0, 1]]).status is RowsStatus.OK
            link.close()
        for other, remedy in ((stranger, "--tls-dir.*barista.internal.*ca.pem"), (TRUST, "")):
            with pytest.raises(LinkDown, match=f"{worker.address}.*{remedy}"):
                attach(worker.address, hello(model), other)


ENGINE = """
import sys, torch
from experts.attach import Hello, attach
from experts.expert_model import ExpertModel
from experts.numerics import numerics_id
from barista.errors import ConfigError
from barista.trust import Trust
model = ExpertModel.from_json(sys.stdin.readline())
said = Hello(engine_id="e", model=model, numerics_id=numerics_id(torch.float32), max_rows=8)
links = [attach(sys.argv[1], said, Trust("test-token"), transport) for transport in ("grpc", "shm")]
print("attached", flush=True)
sys.stdin.read()
"""


def test_a_killed_engine_is_forgotten(workers, model):
    """Its threads serve others again, and its window is mapped no more."""
    process = psutil.Process(workers[0].pid)

    def windows() -> int:
        return sum(mapping.path.startswith("/dev/shm/barista-") for mapping in process.memory_maps())

    command = [sys.executable, "-c", ENGINE, workers[0].address]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as engine:
        try:
            engine.stdin.write(model.to_json().encode() + b"\n")
            engine.stdin.flush()
            assert engine.stdout.readline() == b"attached\n"
            assert windows() == 1
        finally:
            engine.kill()
    eventually(lambda: windows() == 0)


def test_engines_beyond_the_limit_are_refused_and_a_thread_is_free_again_when_one_leaves(workers, model):
    links = [attach(workers[0].address, hello(model), TRUST, "grpc") for _ in range(32)]
    with pytest.raises(LinkDown, match=r"RESOURCE_EXHAUSTED.*32 engines"):
        attach(workers[0].address, hello(model), TRUST, "grpc")
    assert client(workers[0]).describe().name == "worker-0"
    for link in links:
        link.close()

    def attaches() -> bool:
        try:
            attach(workers[0].address, hello(model), TRUST, "grpc").close()
        except LinkDown:
            return False
        return True

    eventually(attaches)


def test_ctrl_c_is_for_others_and_sigterm_ends_a_worker_in_order(victim, model):
    link = attach(victim.address, hello(model), TRUST)
    victim.process.send_signal(signal.SIGINT)
    assert ask(link, [[0, 1]]).status is RowsStatus.OK
    victim.process.terminate()
    assert victim.process.wait(10) == 0
    eventually(lambda: link.down)
    link.close()


def test_a_worker_ends_when_its_parent_does(victim):
    victim.process.stdin.close()
    assert victim.process.wait(10) == 0


def test_a_worker_without_its_checkpoint_says_so(tmp_path, model):
    file = tmp_path / "model.json"
    file.write_text(dataclasses.replace(model, path=tmp_path / "gone").to_json())
    command = [sys.executable, "-m", "experts.worker", "--name", "worker-5", "--model", str(file), "--capacity", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "BARISTA_POOL_TOKEN": "x"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 1
    assert "worker-5" in ended.stderr
    assert str(tmp_path / "gone") in ended.stderr
    assert "Traceback" not in ended.stderr
