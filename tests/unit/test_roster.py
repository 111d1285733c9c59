"""Attaching and attaching again: in good time, and without a word too many."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from experts import kernels
from experts.link import LinkDown
from experts.liveness import EXPERT_COST
from experts.pool_view import PoolView, WorkerView
from experts.roster import BUSY, LONGEST_RETRY_SECONDS, WELL, Member, Roster, Routing
from tests.unit.fake_links import Clock, FakeLink, attached_roster, random_weights, view

VIEW = view({0: [["a"]] * 6}, "a")


def eventually(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


class Refusals:
    """Refuses until `link` is there."""

    def __init__(self) -> None:
        self.link: FakeLink | None = None
        self.tried: list[str] = []

    def __call__(self, worker: WorkerView) -> FakeLink:
        self.tried.append(worker.address)
        if self.link is None:
            raise LinkDown("connection refused")
        return self.link


def test_a_worker_that_stays_away_is_asked_less_and_less_often_and_mentioned_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experts.roster.CHECK_SECONDS", 0.002)
    clock, attach = Clock(), Refusals()
    with caplog.at_level(logging.WARNING):
        roster = Roster(attach, {0: 6}, clock)
        try:
            roster.update(VIEW)
            for attempt in range(1, 7):
                eventually(lambda attempt=attempt: len(attach.tried) == attempt)
                eventually(lambda: not roster.members[0].attaching)
                waited = roster.members[0].retry_at - clock.now
                assert waited == min(0.25 * 2 ** (attempt - 1), LONGEST_RETRY_SECONDS)
                clock.now += waited
            attach.link = FakeLink(clock, random_weights(), ())
            clock.now += LONGEST_RETRY_SECONDS
            eventually(lambda: roster.members[0].up)
        finally:
            roster.close()
    assert len(caplog.records) == 1
    assert all(type(value) is str for value in caplog.records[0].args or ())  # an error would keep its frames alive


def test_a_worker_that_comes_back_elsewhere_is_attached_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.roster.CHECK_SECONDS", 0.002)
    clock, attach = Clock(), Refusals()
    roster = Roster(attach, {0: 6}, clock)
    try:
        roster.update(VIEW)
        eventually(lambda: len(attach.tried) == 1 and not roster.members[0].attaching)
        attach.link = FakeLink(clock, random_weights(), ())
        again = replace(VIEW.workers[0], address="a:2", incarnation="second")
        roster.update(replace(VIEW, epoch=2, workers=(again,)))
        eventually(lambda: roster.members[0].up)
        assert attach.tried == ["a:1", "a:2"]
    finally:
        roster.close()


def test_a_worker_that_has_moved_is_attached_again_though_its_old_link_seems_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("experts.roster.CHECK_SECONDS", 0.002)
    clock = Clock()
    links = {address: FakeLink(clock, random_weights(), ()) for address in ("a:1", "a:2")}
    roster = Roster(lambda worker: links[worker.address], {0: 6}, clock)
    try:
        roster.update(VIEW)
        eventually(lambda: roster.members[0].link is links["a:1"])
        moved = replace(VIEW.workers[0], address="a:2", incarnation="second")
        roster.update(replace(VIEW, epoch=2, workers=(moved,)))
        eventually(lambda: roster.members[0].link is links["a:2"])
        eventually(lambda: links["a:1"].down)
    finally:
        roster.close()


def test_an_unforeseen_error_does_not_end_the_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.roster.CHECK_SECONDS", 0.002)
    reported: list[object] = []
    monkeypatch.setattr("threading.excepthook", reported.append)
    links = [FakeLink(Clock(), random_weights(), ())]

    def attach(worker: WorkerView) -> FakeLink:
        if not reported:
            raise RuntimeError("can't start new thread")
        return links[0]

    roster = Roster(attach, {0: 6}, Clock())
    try:
        roster.update(VIEW)
        eventually(lambda: roster.members[0].up)
    finally:
        roster.close()


def test_who_reads_while_a_view_is_taken_in_sees_all_of_the_old_one_or_all_of_the_new() -> None:
    roster = Roster(Refusals(), {0: 6}, Clock())
    try:
        roster.update(VIEW)
        meet = roster._meet

        def read_and_meet(worker: WorkerView) -> None:
            before = roster.placement
            roster.awaited((0, 0))
            meet(worker)
            roster.awaited((0, 0))
            assert (before, roster.placement) == ((1, 1), (1, 1))

        roster._meet = read_and_meet  # type: ignore[method-assign]
        roster.update(replace(view({0: [["b"]] * 6}, "ab"), epoch=2))
        assert roster.placement == (1, 2)
        assert roster.awaited((0, 0))
    finally:
        roster.close()


def test_a_new_term_may_begin_with_a_lower_epoch() -> None:
    roster = Roster(Refusals(), {0: 6}, Clock())
    try:
        roster.update(replace(VIEW, term=1, epoch=30))
        roster.update(replace(VIEW, term=2, epoch=3))
        assert roster.placement == (2, 3)
        roster.update(replace(VIEW, term=1, epoch=31))
        assert roster.placement == (2, 3)
    finally:
        roster.close()


def test_what_is_uncovered_is_found_once_and_again_when_it_may_have_changed() -> None:
    clock = Clock()
    links = {name: FakeLink(clock, random_weights(), ()) for name in "ab"}
    roster = attached_roster(links, view({0: [["a"]] * 5 + [["b"]]}, "ab"), clock)
    try:
        assert roster.uncovered() == []
        route = roster._route
        roster._route = None  # type: ignore[method-assign, assignment]
        assert roster.uncovered() == []
        roster._route = route  # type: ignore[method-assign]
        links["b"].close()
        assert roster.uncovered() == [(0, 5)]
        roster.members[0].liveness.quarantine(clock.now)
        assert roster.uncovered() == [(0, 5)]
        assert len(roster.uncovered(well=True)) == 6
        roster.loaded(roster.members[0], [(0, 5)])
        assert roster.uncovered() == []
    finally:
        roster.close()


# ---------------------------------------------------------------------- weights


def weighted(**weights: float) -> PoolView:
    """Both workers hold everything."""
    return replace(PAIR, workers=tuple(replace(worker, weight=weights[worker.name]) for worker in PAIR.workers))


PAIR = view({0: [["a", "b"]] * 6}, ["a", "b"])


def routed(pool_view: PoolView) -> list[int]:
    """Rows at each worker of a batch that asks once for every expert."""
    clock = Clock()
    links = {name: FakeLink(clock, random_weights(), range(6)) for name in "ab"}
    roster = attached_roster(links, PAIR, clock)
    try:
        roster.update(replace(pool_view, epoch=2))
        routing = roster.routing(0, clock.now)
        owner = kernels.route(np.arange(6, dtype=np.int32)[:, None], routing.replicas, routing.cost, EXPERT_COST)
        return [int((owner == member.index).sum()) for member in roster.members]
    finally:
        roster.close()


def test_workers_of_equal_weight_share_the_rows() -> None:
    assert routed(weighted(a=1.0, b=1.0)) == [3, 3]


def test_a_worker_of_half_the_weight_gets_half_as_many_rows() -> None:
    assert routed(weighted(a=0.5, b=1.0)) == [2, 4]


def test_a_failing_worker_gets_nothing_that_another_one_holds() -> None:
    assert routed(weighted(a=0.0, b=1.0)) == [0, 6]


def test_a_failing_worker_is_asked_for_what_nobody_else_holds() -> None:
    alone = replace(weighted(a=0.0, b=1.0), replicas={0: (("a",),) * 2 + (("a", "b"),) * 4})
    assert routed(alone) == [2, 4]


def test_a_failing_worker_stands_behind_one_that_owes_an_answer() -> None:
    members = tuple(Member(index, worker) for index, worker in enumerate(weighted(a=0.0, b=1.0).workers))
    assert Routing.of(1, members, ((0, 1),), (WELL, BUSY)).replicas.tolist() == [[1]]


def test_all_workers_failing_are_asked_all_the_same() -> None:
    assert sum(routed(weighted(a=0.0, b=0.0))) == 6
