"""Loading what nobody holds: shared out by room, and not held up by a survivor that does not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from barista.v1 import experts_pb2 as pb
from experts import on_demand
from experts.on_demand import OnDemandLoader, share_out
from experts.roster import ExpertKey, Member
from tests.unit.fake_links import Clock, FakeLink, attached_roster, random_weights, view

KEYS = [(0, expert) for expert in range(6)]


class FakeControl:
    """A worker with room for ten experts. gate: what its answers wait for."""

    def __init__(self, gate: threading.Event) -> None:
        self._gate = gate

    def describe(self) -> pb.DescribeReply:
        self._gate.wait(10)
        return pb.DescribeReply(capacity_bytes=10)

    def assign(self, keys: Iterable[ExpertKey], *, term: int, epoch: int) -> Iterator[pb.AssignProgress]:
        yield pb.AssignProgress(loaded=[pb.HeldExpert(layer=layer, expert=expert) for layer, expert in keys])


@pytest.fixture
def hung() -> Iterator[threading.Event]:
    """Set at the end, so that no thread stays."""
    event = threading.Event()
    yield event
    event.set()


def test_a_survivor_that_says_nothing_holds_up_no_other(hung: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_demand, "DESCRIBE_SECONDS", 0.05)
    clock = Clock()
    links = {name: FakeLink(clock, random_weights(), ()) for name in "abc"}
    roster = attached_roster(links, view({0: [["a"]] * 6}, "abc"), clock)
    try:
        links["a"].close()
        well = threading.Event()
        well.set()
        controls = {"b": FakeControl(hung), "c": FakeControl(well)}
        loader = OnDemandLoader(roster, lambda member: controls[member.name], lambda layer: 1)
        loader.want(0)
        limit = time.monotonic() + 5
        while roster.uncovered():
            assert time.monotonic() < limit
            roster.wait_changed(0.01)
        assert loader.loads == len(KEYS)
    finally:
        roster.close()


def test_a_failing_worker_is_no_survivor() -> None:
    clock = Clock()
    links = {name: FakeLink(clock, random_weights(), ()) for name in "abc"}
    roster = attached_roster(links, view({0: [["a"]] * 6}, "abc"), clock)
    try:
        links["a"].close()
        workers = roster.view.workers
        failing = tuple(replace(worker, weight=float(worker.name != "b")) for worker in workers)
        roster.update(replace(roster.view, workers=failing))
        well = threading.Event()
        well.set()
        asked = []

        def connect(member: Member) -> FakeControl:
            asked.append(member.name)
            return FakeControl(well)

        loader = OnDemandLoader(roster, connect, lambda layer: 1)
        loader.want(0)
        limit = time.monotonic() + 5
        while roster.uncovered():
            assert time.monotonic() < limit
            roster.wait_changed(0.01)
        assert set(asked) == {"c"}
    finally:
        roster.close()


def test_a_load_that_has_stalled_is_not_waited_for(hung: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_demand, "STALL_SECONDS", 0.05)
    clock = Clock()
    links = {"a": FakeLink(clock, random_weights(), ()), "b": FakeLink(clock, random_weights(), ())}
    roster = attached_roster(links, view({0: [["a"]] * 6}, "ab"), clock)

    class Stalls(FakeControl):
        def assign(self, keys: Iterable[ExpertKey], *, term: int, epoch: int) -> Iterator[pb.AssignProgress]:
            nonlocal asked
            asked += 1
            if asked == 1:
                hung.wait(10)
            else:
                yield from super().assign(keys, term=term, epoch=epoch)

    asked = 0
    try:
        links["a"].close()
        loader = OnDemandLoader(roster, lambda member: Stalls(SimpleNamespace(wait=lambda _: None)), lambda layer: 1)
        limit = time.monotonic() + 5
        while roster.uncovered():
            assert time.monotonic() < limit
            loader.want(0)
            roster.wait_changed(0.01)
    finally:
        roster.close()


@given(
    free=st.lists(st.integers(0, 12), max_size=4),
    keys=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), unique=True),
)
def test_shares_fit_and_nothing_is_left_out_while_someone_has_room(free: list[int], keys: list[ExpertKey]) -> None:
    size = (1, 2, 3).__getitem__
    shares = share_out(keys, free, size)
    given = [key for share in shares for key in share]
    room = [have - sum(size(layer) for layer, _ in share) for have, share in zip(free, shares, strict=True)]
    assert len(set(given)) == len(given)
    assert all(left >= 0 for left in room)
    assert all(size(layer) > left for layer, expert in set(keys) - set(given) for left in room)
