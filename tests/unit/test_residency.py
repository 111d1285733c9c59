"""The policy of experts larger than memory: what it holds, what it drops, and in which order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from experts.residency import Expert, Residency

LAYERS, EXPERTS = 3, 6
SIZES = {1: 10, 2: 10, 4: 15}  # by layer; layer 0 and 3 are dense
TOUCHES = st.lists(
    st.tuples(st.sampled_from(list(SIZES)), st.sets(st.integers(0, EXPERTS - 1), min_size=1).map(sorted)), max_size=40
)
LIMITS = st.integers(1, 250)


@given(limit=LIMITS, touches=TOUCHES)
def test_what_is_held_is_what_was_read_and_not_dropped_and_keeps_the_limit_unless_one_layer_needs_more(
    limit: int, touches: list[tuple[int, list[int]]]
) -> None:
    residency = Residency(limit, SIZES)
    held: set[Expert] = set()
    for layer, experts in touches:
        wanted = {(layer, expert) for expert in experts}
        change = residency.touch(layer, experts)
        assert set(change.to_read) == wanted - held
        assert set(change.to_drop) <= held - wanted
        held = held - set(change.to_drop) | wanted
        assert residency.held == held
        assert residency.resident_bytes == sum(SIZES[layer] for layer, _ in held)
        assert residency.resident_bytes <= limit or held == wanted


@given(limit=LIMITS, touches=TOUCHES)
def test_every_query_is_a_hit_or_is_read(limit: int, touches: list[tuple[int, list[int]]]) -> None:
    residency = Residency(limit, SIZES)
    read = sum(len(residency.touch(layer, experts).to_read) for layer, experts in touches)
    assert residency.queries == sum(len(experts) for _, experts in touches)
    assert residency.hits == residency.queries - read


@given(limit=LIMITS, touches=TOUCHES)
def test_nothing_is_dropped_while_there_is_room_and_no_more_than_makes_room(
    limit: int, touches: list[tuple[int, list[int]]]
) -> None:
    residency = Residency(limit, SIZES)
    for layer, experts in touches:
        change = residency.touch(layer, experts)
        if change.to_drop:
            assert residency.resident_bytes + SIZES[change.to_drop[-1][0]] > limit


@given(limit=LIMITS, touches=TOUCHES)
def test_of_one_layer_the_experts_used_last_stay(limit: int, touches: list[tuple[int, list[int]]]) -> None:
    residency = Residency(limit, SIZES)
    used: dict[Expert, int] = {}
    for now, (layer, experts) in enumerate(touches):
        used |= {(layer, expert): now for expert in experts}
        for dropped in residency.touch(layer, experts).to_drop:
            kept = [used[expert] for expert in residency.held if expert[0] == dropped[0]]
            assert all(used[dropped] <= last for last in kept)


@given(layers=st.integers(2, 8), share=st.floats(0.3, 1))
def test_steps_that_ask_for_more_than_there_is_room_for_still_find_what_there_was_room_for(
    layers: int, share: float
) -> None:
    limit = max(EXPERTS, int(layers * EXPERTS * share))
    residency = Residency(limit, dict.fromkeys(range(layers), 1))
    for _ in range(4):
        before = residency.hits
        for layer in range(layers):
            residency.touch(layer, range(EXPERTS))
    hits = residency.hits - before  # by the clock's recency there would be none below a share of 1
    assert hits >= limit - EXPERTS


def test_an_expert_that_its_layer_has_not_asked_for_lately_goes_before_those_that_others_just_used() -> None:
    residency = Residency(4, {0: 1, 1: 1})
    residency.touch(0, [0, 1])
    residency.touch(1, [0])
    residency.touch(0, [1])
    residency.touch(1, [0, 1])
    assert residency.touch(0, [2]).to_drop == ((0, 0),)
