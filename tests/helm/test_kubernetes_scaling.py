"""How many worker pods there are: whole groups, within bounds, and no to and fro."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.kubernetes.scaling import Limits, Scaler

limits = st.builds(
    Limits,
    group=st.integers(1, 5),
    least=st.integers(0, 12),
    most=st.integers(0, 30),
    high=st.integers(1, 20),
    low=st.just(0),
    up_seconds=st.floats(0, 60),
    down_seconds=st.floats(0, 600),
)
observations = st.lists(
    st.tuples(st.floats(0.1, 100), st.one_of(st.none(), st.integers(0, 30)), st.booleans()), max_size=40
)


@given(limits, st.integers(0, 40), observations)
def test_always_whole_groups_within_the_bounds(limits, replicas, observed):
    scaler, now = Scaler(limits), 0.0
    for step, waiting, settled in observed:
        now += step
        replicas = scaler.decide(now, replicas, waiting, settled=settled)
        assert replicas % limits.group == 0
        assert limits.fewest_groups <= replicas // limits.group <= limits.most_groups


@given(limits, st.integers(0, 40), st.one_of(st.none(), st.integers(0, 30)), st.lists(st.floats(0.1, 500), max_size=60))
def test_a_steady_load_never_makes_it_turn_round(limits, replicas, waiting, steps):
    scaler, now, sizes = Scaler(limits), 0.0, []
    for step in steps:
        now += step
        replicas = scaler.decide(now, replicas, waiting, settled=True)
        sizes.append(replicas)
    assert sizes in (sorted(sizes), sorted(sizes, reverse=True))


@given(limits, observations)
def test_one_group_at_a_time_and_not_before_the_load_has_lasted(limits, observed):
    scaler, now = Scaler(limits), 0.0
    replicas = limits.group * limits.fewest_groups
    since = {"up": None, "down": None}
    for step, waiting, settled in observed:
        now += step
        for way, holds in (
            ("up", settled and waiting is not None and waiting >= limits.high),
            ("down", settled and waiting is not None and waiting <= limits.low),
        ):
            since[way] = (now if since[way] is None else since[way]) if holds else None
        wanted = scaler.decide(now, replicas, waiting, settled=settled)
        assert abs(wanted - replicas) in (0, limits.group)
        if wanted > replicas:
            assert now - since["up"] >= limits.up_seconds
        if wanted < replicas:
            assert now - since["down"] >= limits.down_seconds
        replicas = wanted


def play(scaler, replicas, *observed):
    """(time, waiting) in turn; returns the sizes."""
    sizes = []
    for now, waiting in observed:
        replicas = scaler.decide(now, replicas, waiting, settled=True)
        sizes.append(replicas)
    return sizes


def test_a_queue_that_lasts_adds_a_group_and_must_last_again_for_the_next():
    scaler = Scaler(Limits(group=2, least=2, most=6))
    assert play(scaler, 2, (0, 9), (29, 9), (30, 9), (31, 9), (61, 9), (91, 9)) == [2, 2, 4, 4, 6, 6]


def test_a_queue_that_comes_and_goes_adds_nothing():
    scaler = Scaler(Limits(group=1, least=1, most=6))
    assert play(scaler, 1, *((float(now), 9 * (now % 20 < 10)) for now in range(300))) == [1] * 300


def test_a_long_calm_takes_a_group_away_down_to_the_least():
    scaler = Scaler(Limits(group=2, least=3, most=6))
    assert play(scaler, 6, (0, 0), (599, 0), (600, 0), (1201, 0), (1802, 0)) == [6, 6, 4, 4, 4]


def test_nothing_is_added_while_the_last_ones_still_load():
    scaler = Scaler(Limits(group=1, least=1, most=6))
    sizes = {scaler.decide(float(now), 2, 50, settled=False) for now in range(1000)}
    assert sizes == {2}


def test_an_unknown_queue_changes_nothing_but_a_broken_group_is_made_whole():
    scaler = Scaler(Limits(group=4, least=4, most=12))
    assert {scaler.decide(float(now), 8, None, settled=True) for now in range(0, 5000, 10)} == {8}
    assert scaler.decide(6000.0, 5, None, settled=False) == 8


def test_bounds_that_hold_no_whole_group_give_one():
    scaler = Scaler(Limits(group=4, least=1, most=3))
    assert scaler.decide(0.0, 0, None, settled=True) == 4
