"""Following the controller: one conversation at a time, whatever ended the one before."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import pytest

from barista.errors import ConfigError
from barista.v1 import controller_pb2 as pb
from experts.pool_view import PoolView, PoolWatch
from experts.remote import PoolConfig, RemotePool
from tests.distributed.static_pool import FakeController
from tests.distributed.workers import TRUST, tiny_expert_model


@pytest.fixture
def controller() -> Iterator[FakeController]:
    running = FakeController()
    yield running
    running.stop()


def ignore(view: PoolView) -> None:
    pass


def test_an_acknowledgement_names_its_term_and_a_lower_epoch_of_a_newer_one_counts() -> None:
    watch = PoolWatch("nowhere:1", TRUST, "engine", ignore, dict)
    wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
    requests = watch._requests(wake)
    said = [next(requests)]
    for term, epoch in ((1, 30), (2, 3), (1, 31)):
        watch.acknowledge(term, epoch)
        wake.put(True)
        if (term, epoch) != (1, 31):  # of a term that has passed
            said.append(next(requests))
    assert [(request.term, request.acknowledged_epoch) for request in said] == [(0, 0), (1, 30), (2, 3)]


def test_a_conversation_that_has_ended_takes_no_counts_with_it() -> None:
    counts = [{0: [1]}, {0: [2]}]
    watch = PoolWatch("nowhere:1", TRUST, "engine", ignore, lambda: counts.pop(0))
    wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
    requests = watch._requests(wake)
    next(requests)
    wake.put(False)
    assert next(requests, None) is None
    assert counts == [{0: [2]}]


def test_a_view_that_cannot_be_used_does_not_end_the_watch(
    controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experts.pool_view.RECONNECT_SECONDS", 0.01)
    seen: queue.SimpleQueue[int] = queue.SimpleQueue()
    broken = [ValueError("no such layer")]

    def on_view(view: PoolView) -> None:
        if broken:
            raise broken.pop()
        seen.put(view.epoch)

    controller.publish(pb.PoolState(term=1, epoch=7))
    watch = PoolWatch(controller.address, TRUST, "engine", on_view, dict)
    watch.start()
    try:
        assert seen.get(timeout=10) == 7
    finally:
        watch.close()
        watch._thread.join(10)
        assert not watch._thread.is_alive()


def test_a_start_that_stands_still_says_what_it_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.remote.STANDSTILL_SECONDS", 1.0)
    config = PoolConfig(controller="127.0.0.1:1", trust=TRUST, transport="auto", numerics_id="", max_rows=8)
    remote = RemotePool(tiny_expert_model(tmp_path), dict.fromkeys(range(4), 1), config)
    remote.start()
    try:
        with pytest.raises(ConfigError, match=r"controller at 127.0.0.1:1 does not answer: \S+") as caught:
            remote.wait_covered(lambda fraction, message: None)
        assert "127.0.0.1:1" in caught.value.remedy
    finally:
        remote.close()
        remote._watch._thread.join(10)
        remote._acknowledger.join(10)
