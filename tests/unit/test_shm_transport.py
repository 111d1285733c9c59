"""Rows through shared memory: two processes, every byte checked; late answers, deaths, and what makes no sense."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from experts import kernels
from experts.link import LinkDown, RowsRequest, RowsStatus
from experts.transport.shm import ShmLink, serve_window
from experts.transport.window import Combine, Dispatch, Window, create_window, open_window
from tests.unit import shm_peer

ROOT = Path(__file__).parents[2]
HIDDEN, TOP_K, MAX_ROWS = 40, 4, 8
SOON = 20.0  # seconds within which what must happen has happened on any machine

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or kernels.numerics_id() == "torch-reference", reason="windows need Linux and a compiler"
)


@contextmanager
def peer(role: str):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.shm_peer", role],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def stopped(process: subprocess.Popen):
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)  # all of its threads have stopped now
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def worker():
    with peer("worker") as process:
        yield process


def attach(process: subprocess.Popen) -> ShmLink:
    window = create_window(MAX_ROWS, TOP_K, HIDDEN, torch.float32)
    print(json.dumps(shm_peer.offer(window)), file=process.stdin, flush=True)
    assert process.stdout.readline() == "ok\n"
    return ShmLink(window)


@pytest.fixture
def link(worker):
    link = attach(worker)
    yield link
    link.close()


@contextmanager
def both_ends(compute=shm_peer.compute):
    """A window with both ends in this process: the engine's mapping and the worker's, served by a thread."""
    near = create_window(MAX_ROWS, TOP_K, HIDDEN, torch.float32)
    far = open_window(near.name, near.nonce, near.size_bytes)
    thread = threading.Thread(target=serve_window, args=(far, compute))
    thread.start()
    try:
        yield near, far, thread
    finally:
        near.close()
        thread.join()


def random_request(step: int, random_: np.random.Generator, layer: int = 3) -> RowsRequest:
    hidden_states = torch.from_numpy(random_.integers(-(2**31), 2**31, (12, HIDDEN), np.int32)).view(torch.float32)
    num_rows = int(random_.integers(0, MAX_ROWS + 1))
    tokens = np.sort(random_.choice(12, num_rows, replace=False)).astype(np.int32)
    topk_ids = random_.integers(-1, 60, (num_rows, TOP_K)).astype(np.int32)
    return RowsRequest(step, layer, step % 3, 5, hidden_states, tokens, topk_ids, int((topk_ids >= 0).sum()))


def expected(request: RowsRequest) -> bytes:
    rows = request.hidden_states.view(torch.int32).numpy()[request.tokens]
    return shm_peer.expert_rows(request.layer, rows, request.topk_ids).tobytes()


def exchange(link: ShmLink, request: RowsRequest) -> bytes:
    link.send(request)
    reply = link.receive(time.monotonic() + SOON)
    assert reply is not None
    assert (reply.step, reply.layer, reply.attempt) == (request.step, request.layer, request.attempt)
    assert (reply.status, reply.epoch, reply.not_held) == (RowsStatus.OK, shm_peer.EPOCH, ())
    return ctypes.string_at(reply.address, request.num_pairs * HIDDEN * 4)


def test_thousands_of_rounds_between_two_processes_lose_no_byte(link):
    random_ = np.random.default_rng(1)
    for step in range(3000):
        request = random_request(step, random_)
        assert exchange(link, request) == expected(request)
        if step % 8 == 0:
            time.sleep(random.choice((0, 1e-5, 3e-4)))
    assert link.counters.requests == 3000
    assert link.counters.bytes_sent > link.counters.requests
    assert (link.outstanding, link.down) == (0, False)


def test_rows_are_gathered_from_a_strided_tensor(link):
    wide = torch.arange(12 * 3 * HIDDEN, dtype=torch.float32).view(12, 3 * HIDDEN)
    request = random_request(1, np.random.default_rng(2))
    request = RowsRequest(1, 3, 1, 0, wide[:, HIDDEN : 2 * HIDDEN], request.tokens, request.topk_ids, request.num_pairs)
    assert exchange(link, request) == expected(request)


@pytest.mark.parametrize(
    ("layer", "status", "not_held"),
    [
        (shm_peer.LAYER_NOT_HELD, RowsStatus.NOT_HELD, (3, 5)),
        (shm_peer.LAYER_THAT_RAISES, RowsStatus.FAILED, ()),
    ],
)
def test_a_worker_says_what_went_wrong_and_goes_on(layer, status, not_held, caplog):
    with both_ends() as (near, _, _):
        link = ShmLink(near)
        request = random_request(1, np.random.default_rng(3), layer)
        link.send(request)
        reply = link.receive(time.monotonic() + SOON)
        assert (reply.status, reply.not_held, reply.address) == (status, not_held, 0)
        request = random_request(2, np.random.default_rng(3))
        assert exchange(link, request) == expected(request)


def test_a_late_answer_keeps_its_own_name(worker, link):
    first, second = (random_request(step, np.random.default_rng(step)) for step in (1, 2))
    with stopped(worker):
        link.send(first)
        assert link.receive(time.monotonic() - 1) is None
        assert link.receive(time.monotonic() + 0.05) is None
        assert (link.outstanding, link.down) == (1, False)
        with pytest.raises(RuntimeError, match="without an answer"):
            link.send(second)
    late = link.receive(time.monotonic() + SOON)
    assert (late.step, late.attempt) == (first.step, first.attempt)
    assert ctypes.string_at(late.address, first.num_pairs * HIDDEN * 4) == expected(first)
    assert exchange(link, second) == expected(second)


def test_an_answer_outlives_its_link():
    with both_ends() as (near, _, _):
        link = ShmLink(near)
        request = random_request(1, np.random.default_rng(4))
        link.send(request)
        reply = link.receive(time.monotonic() + SOON)
    link.close()
    del near, link
    assert ctypes.string_at(reply.address, request.num_pairs * HIDDEN * 4) == expected(request)


def wait_in_a_thread(link: ShmLink) -> tuple[threading.Thread, list[BaseException]]:
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            link.receive(time.monotonic() + 10 * SOON)
        except LinkDown as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, raised


def assert_ends_soon(thread: threading.Thread) -> None:
    thread.join(SOON)
    assert not thread.is_alive()


def test_abort_from_another_thread_ends_a_wait(worker, link):
    with stopped(worker):
        link.send(random_request(1, np.random.default_rng(5)))
        thread, raised = wait_in_a_thread(link)
        thread.join(0.05)
        assert thread.is_alive()
        link.abort()
        assert_ends_soon(thread)
        assert len(raised) == 1
        assert link.down


def test_the_other_end_sees_a_closed_window():
    with both_ends() as (near, far, thread):
        link = ShmLink(near)
        far.close()
        assert_ends_soon(thread)
        assert link.down
        with pytest.raises(LinkDown):
            link.send(random_request(1, np.random.default_rng(6)))
        assert link.outstanding == 0


def test_the_link_is_down_when_the_control_stream_is():
    callbacks = []
    with both_ends() as (near, _, thread):
        link = ShmLink(near, on_control_down=callbacks.append)
        callbacks[0]()
        assert link.down
        assert_ends_soon(thread)


def test_a_killed_worker_ends_the_wait_through_its_control_stream():
    with peer("worker") as process:
        link = attach(process)
        with stopped(process):
            link.send(random_request(1, np.random.default_rng(7)))
            thread, raised = wait_in_a_thread(link)
            process.kill()
        assert process.stdout.read() == ""
        link.abort()
        assert_ends_soon(thread)
        assert len(raised) == 1
        assert not list(Path("/dev/shm").glob(f"barista-{os.getpid()}-*"))


def test_a_killed_engine_ends_the_serving_and_leaves_no_attached_segment():
    with peer("engine") as process:
        offers = json.loads(process.stdout.readline())
        attached, forgotten = (Path("/dev/shm") / offer["name"] for offer in offers)
        window = shm_peer.accept(offers[0])
        served = threading.Event()

        def compute(*arguments):
            served.set()
            return shm_peer.compute(*arguments)

        thread = threading.Thread(target=serve_window, args=(window, compute))
        thread.start()
        try:
            print(file=process.stdin, flush=True)
            assert served.wait(SOON)
            create_window(1, 1, 1, torch.float32).unlink()
            assert forgotten.exists(), "a living engine's window was swept away"
            process.kill()
            assert process.stdout.read() == ""
            process.wait()
        finally:
            window.close()
        assert_ends_soon(thread)
        assert not attached.exists()
        assert forgotten.exists()
        create_window(1, 1, 1, torch.float32).unlink()
        assert not forgotten.exists()


def send_raw(window: Window, dispatch: Dispatch) -> None:
    tokens, topk_ids = np.zeros(1, np.int32), np.full((1, TOP_K), 5, np.int32)
    row = torch.zeros(1, HIDDEN)
    window.functions.bk_window_send(
        window.end, 1, ctypes.addressof(dispatch), row.data_ptr(), 1, 0, tokens.ctypes.data, topk_ids.ctypes.data
    )


@pytest.mark.parametrize("wrong", [{"num_pairs": TOP_K - 1}, {"num_pairs": TOP_K + 1}, {"size": 1}])
def test_a_worker_closes_a_window_with_a_request_that_makes_no_sense(wrong):
    with both_ends() as (near, _, thread):
        fields = {"size": ctypes.sizeof(Dispatch), "num_rows": 1, "num_pairs": TOP_K}
        send_raw(near, Dispatch(**fields | wrong))
        assert_ends_soon(thread)
        assert near.closed


def test_a_link_goes_down_with_an_answer_that_makes_no_sense():
    near = create_window(MAX_ROWS, TOP_K, HIDDEN, torch.float32)
    far = open_window(near.name, near.nonce, near.size_bytes)
    link = ShmLink(near)
    link.send(random_request(1, np.random.default_rng(8)))
    combine = Combine(size=ctypes.sizeof(Combine), status=17)
    far.functions.bk_window_answer(far.end, 1, ctypes.addressof(combine))
    with pytest.raises(LinkDown, match="makes no sense"):
        link.receive(time.monotonic() + SOON)
    assert link.down


def test_rows_that_do_not_fit_are_not_sent():
    near = create_window(MAX_ROWS, TOP_K, HIDDEN, torch.float32)
    near.unlink()
    link = ShmLink(near)
    hidden_states = torch.zeros(MAX_ROWS + 1, HIDDEN)
    topk_ids = np.zeros((MAX_ROWS + 1, TOP_K), np.int32)
    tokens = np.arange(MAX_ROWS + 1, dtype=np.int32)
    with pytest.raises(ValueError, match="do not fit"):
        link.send(RowsRequest(1, 0, 0, 0, hidden_states, tokens, topk_ids, topk_ids.size))
    with pytest.raises(ValueError, match="out of range"):
        link.send(RowsRequest(1, 0, 0, 0, hidden_states, tokens[-1:] + 1, topk_ids[:1], TOP_K))
    assert link.outstanding == 0
