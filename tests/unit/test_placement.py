"""A placement is a value: changes give the next epoch, and an expert's weights never change under its name."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from barista.placement import Placement

KEYS = [(layer, expert) for layer in range(2) for expert in range(3)]
some_keys = st.sets(st.sampled_from(KEYS))


def digests(keys):
    return {key: bytes(key) * 8 for key in keys}


def test_an_empty_placement_names_every_expert_and_covers_none():
    placement = Placement.empty({0: 3, 1: 3})
    assert placement.epoch == 0
    assert placement.uncovered() == tuple(KEYS)
    assert placement.coverage() == 0


def test_a_model_without_experts_is_covered():
    assert Placement.empty({}).coverage() == 1


@given(a=some_keys, b=some_keys)
def test_coverage_counts_the_experts_that_a_live_worker_holds(a, b):
    placement = Placement.empty({0: 3, 1: 3}).with_replicas("a", digests(a)).with_replicas("b", digests(b))
    assert placement.held_by("a") == a
    assert placement.uncovered() == tuple(sorted(set(KEYS) - a - b))
    assert placement.uncovered(["b", "stranger"]) == tuple(sorted(set(KEYS) - b))
    assert placement.coverage(["a"]) == pytest.approx(len(a) / 6)


@given(held=some_keys, released=some_keys)
def test_each_change_is_a_new_epoch_and_leaves_the_old_value_alone(held, released):
    first = Placement.empty({0: 3, 1: 3}).with_replicas("a", digests(held))
    second = first.without_replicas("a", released)
    third = second.without("a")
    assert [first.epoch, second.epoch, third.epoch] == [1, 2, 3]
    assert first.held_by("a") == held
    assert second.held_by("a") == held - released
    assert third.held_by("a") == frozenset()
    assert third.digests == digests(held)


def test_a_replica_added_twice_is_one():
    once = Placement.empty({0: 3}).with_replicas("a", digests([(0, 1)]))
    assert once.with_replicas("a", digests([(0, 1)])).replicas == once.replicas


def test_other_weights_under_an_experts_name_are_refused_even_after_the_last_replica_has_gone():
    placement = Placement.empty({0: 3}).with_replicas("a", {(0, 1): b"good"}).without("a")
    with pytest.raises(ValueError, match="worker b holds other weights as expert \\(0, 1\\)"):
        placement.with_replicas("b", {(0, 1): b"evil"})


def test_an_expert_that_the_model_does_not_have_is_refused():
    with pytest.raises(ValueError, match="which the model does not have"):
        Placement.empty({0: 3}).with_replicas("a", {(0, 3): b"x"})
    with pytest.raises(ValueError, match="digests of experts that the model does not have"):
        Placement(0, {}, {(0, 3): b"x"})


def test_a_worker_is_named_once_per_expert():
    with pytest.raises(ValueError, match="names a worker twice"):
        Placement(0, {(0, 0): ("a", "a")}, {})


def test_a_placement_cannot_be_changed():
    placement = Placement.empty({0: 1})
    with pytest.raises(TypeError):
        placement.replicas[(0, 0)] = ("a",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        placement.epoch = 2
