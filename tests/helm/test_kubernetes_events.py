"""What operators are told of a pool, in Kubernetes Events."""

from __future__ import annotations

import string

from hypothesis import given, settings
from hypothesis import strategies as st

from router.kubernetes.events import BURST, REFILL_SECONDS, Diary
from tests.helm.pools import DRAINING, LOADING, LOST, READY, REFUSED, pool, worker


def told(*states, every=100.0):
    """What a diary says to states that come so far apart, the first of which is where it begins."""
    diary = Diary()
    return [[(news.reason, news.note) for news in diary.read(every * at, state)] for at, state in enumerate(states)]


def test_nothing_is_told_of_the_first_state_or_of_one_like_it():
    broken = pool(worker(0, LOST), worker(1, REFUSED), uncovered=7, epoch=3)
    assert told(broken, broken) == [[], []]


def test_a_lost_worker_is_told_once_and_back_when_it_is_ready():
    up, down, loading = (pool(worker(0), worker(1, state)) for state in (READY, LOST, LOADING))
    assert told(up, down, down, loading, up, up) == [
        [],
        [("WorkerLost", "worker-1 is lost.")],
        [],
        [],
        [("WorkerReturned", "worker-1 is back, with experts loaded.")],
        [],
    ]


def test_a_worker_that_is_lost_again_while_it_loads_is_one_loss():
    up, down, loading = (pool(worker(0, state)) for state in (READY, LOST, LOADING))
    assert [reason for news in told(up, down, loading, down, up) for reason, _ in news] == [
        "WorkerLost",
        "WorkerReturned",
    ]


def test_many_workers_lost_at_once_are_one_event():
    up = pool(*(worker(number) for number in range(8)))
    down = pool(*(worker(number, LOST) for number in range(8)))
    names = "worker-0, worker-1, worker-2, worker-3, worker-4 and 3 more"
    assert told(up, down)[1] == [("WorkerLost", f"{names} are lost.")]


def test_a_single_worker_is_told_of_by_its_pod():
    diary = Diary()
    diary.read(0.0, pool(worker(0)))
    (news,) = diary.read(1.0, pool(worker(0, LOST)))
    assert news.address == "10.0.0.1:40000"
    assert news.warning


def test_coverage_refusals_and_the_pools_size():
    assert told(
        pool(worker(0)),
        pool(worker(0), uncovered=12),
        pool(worker(0), uncovered=5),
        pool(worker(0)),
        pool(worker(0), worker(1, REFUSED)),
        pool(worker(0, DRAINING)),
    )[1:] == [
        [("ExpertsUncovered", "12 experts have no live worker; engines load what they need meanwhile.")],
        [],
        [("ExpertsCovered", "Every expert has a live worker again.")],
        [
            ("WorkerRefused", "worker-1 is refused: see `barista status`."),
            ("PoolScaled", "The pool has 2 workers; it had 1."),
        ],
        [("PoolScaled", "The pool has 1 worker; it had 2.")],
    ]


def test_a_controller_that_has_just_started_is_no_news_of_size():
    assert told(pool(worker(0)), pool(), pool(worker(0))) == [[], [], []]


def test_placement_epochs_within_a_minute_are_one_event():
    states = [pool(worker(0), epoch=epoch, moves=3 * epoch) for epoch in range(1, 9)]
    said = [note for news in told(*states, every=10.0) for _, note in news]
    assert said == ["Placement epoch 7: 18 replicas loaded or released since the last."]


states = st.builds(
    pool,
    *(st.builds(worker, st.just(number), st.sampled_from([READY, LOST, LOADING, REFUSED])) for number in range(3)),
    epoch=st.integers(1, 5),
    uncovered=st.integers(0, 3),
    moves=st.integers(0, 50),
)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0.0, 5.0), states), max_size=80))
def test_events_are_bounded_in_every_stretch_of_time(observed):
    diary, now, times = Diary(), 0.0, []
    for step, state in observed:
        now += step
        times += [now] * len(diary.read(now, state))
    for first, start in enumerate(times):
        for count, end in enumerate(times[first:], start=1):
            assert count <= BURST + (end - start) / REFILL_SECONDS + 1e-6


def test_what_was_left_out_is_counted_in_the_next_event():
    up, down = pool(worker(0)), pool(worker(0, LOST))
    diary = Diary()
    told = [news for at in range(30) for news in diary.read(at / 1000, (up, down)[at % 2])]
    assert len(told) == BURST
    (later,) = diary.read(3600.0, pool(worker(0)))
    assert later.note.endswith(f" {29 - BURST} earlier events were left out.")


@given(states, states)
def test_no_expert_is_named(before, after):
    diary = Diary()
    diary.read(0.0, before)
    for news in diary.read(100.0, after):
        words = news.note.translate(str.maketrans("", "", string.digits))
        assert "layer" not in words
        assert "expert-" not in words
