"""A placement is a value that names every expert of the model and says which of them nobody holds."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from barista.placement import Placement

KEYS = [(layer, expert) for layer in range(2) for expert in range(3)]
some_keys = st.sets(st.sampled_from(KEYS))


def test_an_empty_placement_names_every_expert_and_covers_none():
    placement = Placement.empty({0: 3, 1: 3})
    assert placement.epoch == 0
    assert placement.uncovered() == tuple(KEYS)


@given(a=some_keys, b=some_keys)
def test_an_expert_is_uncovered_if_no_live_worker_holds_it(a, b):
    holders = {key: tuple(name for name, held in (("a", a), ("b", b)) if key in held) for key in KEYS}
    placement = Placement(1, holders, {})
    assert placement.uncovered() == tuple(sorted(set(KEYS) - a - b))
    assert placement.uncovered(["b", "stranger"]) == tuple(sorted(set(KEYS) - b))


def test_a_digest_of_an_expert_that_the_model_does_not_have_is_refused():
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
