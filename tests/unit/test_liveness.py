"""When a worker counts as late, slow or well again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts import liveness
from experts.liveness import HedgeBudget, Liveness, work_of

WORK = work_of(4, 16)


def warmed(seconds: float, answers: int = 64) -> Liveness:
    worker = Liveness()
    for i in range(answers):
        worker.answered(float(i), seconds, WORK)
    return worker


def test_a_deadline_is_eight_times_the_recent_p99_and_at_least_50_ms() -> None:
    assert warmed(0.001).deadline(WORK) == 0.05
    assert warmed(0.1).deadline(WORK) == pytest.approx(0.8)


def test_more_work_may_take_longer() -> None:
    worker = warmed(0.1)
    assert worker.deadline(10 * WORK) == pytest.approx(10 * worker.deadline(WORK))


def test_the_first_answers_may_be_slow() -> None:
    assert Liveness().deadline(WORK) == liveness.COLD_DEADLINE
    assert warmed(0.001, answers=3).deadline(WORK) == liveness.COLD_DEADLINE


def test_one_slow_first_answer_does_not_put_off_the_hedge() -> None:
    worker = Liveness()
    worker.answered(0.0, 0.8, WORK)  # its pages came from the disk
    worker.answered(1.0, 0.001, WORK)
    assert worker.hedge_after(WORK) == liveness.COLD_HEDGE
    assert worker.hedge_after(1000 * WORK) == pytest.approx(3.0)  # much work may take long all the same


@given(st.lists(st.floats(1e-5, 2.0), max_size=80), st.integers(1, 5000))
def test_a_hedge_never_comes_after_the_deadline(latencies: list[float], work: int) -> None:
    worker = Liveness()
    for now, seconds in enumerate(latencies):
        worker.answered(float(now), seconds, WORK)
    assert 0 < worker.hedge_after(work) <= worker.deadline(work)


def test_a_quarantine_ends_after_its_time_and_doubles_when_it_comes_back() -> None:
    worker = Liveness()
    lengths, now = [], 0.0
    for _ in range(7):
        worker.quarantine(now)
        started = now
        while worker.suspect(now, outstanding=0):
            now += 0.25
        lengths.append(now - started)
        now += 1.0
    assert lengths == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_worker_that_was_well_for_long_is_forgiven() -> None:
    worker = Liveness()
    worker.quarantine(0.0)
    assert not worker.suspect(1.0, outstanding=0)
    worker.quarantine(1000.0)
    assert not worker.suspect(1001.0, outstanding=0)


def test_a_worker_stays_suspect_while_it_owes_an_answer() -> None:
    worker = Liveness()
    worker.quarantine(0.0)
    assert worker.suspect(100.0, outstanding=1)
    assert not worker.suspect(100.0, outstanding=0)


def test_a_worker_that_takes_twenty_times_as_long_as_the_others_becomes_suspect_within_a_few_answers() -> None:
    worker = warmed(0.001)
    others = 0.001 / WORK
    for i in range(liveness.STRAGGLER_STREAK):
        assert not worker.suspect(100.0, outstanding=0)
        worker.answered(100.0 + i, 0.02, WORK, others)
    assert worker.suspect(99.5 + liveness.STRAGGLER_STREAK, outstanding=0)


def test_a_worker_as_slow_as_the_others_is_no_straggler() -> None:
    worker = Liveness()
    for i in range(50):
        worker.answered(float(i), 0.5, WORK, 0.4 / WORK)
    assert not worker.suspect(50.0, outstanding=0)


@given(st.lists(st.booleans(), max_size=2000))
def test_hedges_stay_under_their_share_of_dispatches_but_for_the_burst(asks: list[bool]) -> None:
    budget = HedgeBudget()
    hedges = 0
    for ask in asks:
        budget.dispatched()
        hedges += ask and budget.take()
    assert hedges <= liveness.HEDGE_BURST + liveness.HEDGE_SHARE * len(asks) + 1e-6


def test_a_wait_for_somebody_else_is_not_held_against_a_worker() -> None:
    worker = warmed(0.001)
    others, known = 0.001 / WORK, warmed(0.001).deadline(WORK)
    for i in range(3 * liveness.STRAGGLER_STREAK):
        worker.answered(100.0 + i, 0.02, WORK, others, at_least=0.0)
    assert not worker.suspect(100.0, outstanding=0)
    assert worker.deadline(WORK) == known
    for i in range(liveness.STRAGGLER_STREAK):
        worker.answered(200.0 + i, 0.02, WORK, others, at_least=0.019)
    assert worker.suspect(200.5 + liveness.STRAGGLER_STREAK - 1, outstanding=0)


def test_only_a_worker_that_has_just_come_is_new() -> None:
    worker = Liveness()
    assert worker.new
    for i in range(liveness.WARM_ANSWERS):
        worker.answered(float(i), 0.001, WORK)
    worker.quarantine(100.0)
    assert worker.cold
    assert not worker.new
