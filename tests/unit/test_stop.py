from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.api.stop import StopChecker

TEXT = st.text("ab☕", max_size=24)
STOPS = st.lists(st.text("ab☕", min_size=1, max_size=4), max_size=4)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(edges)]


def whole_cut(text: str, stops: list[str]) -> str:
    """By definition: grow the text a character at a time until it ends in a stop string; cut the longest such one."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@given(TEXT, STOPS, st.lists(st.integers(0, 100), max_size=8))
def test_shown_text_does_not_depend_on_the_split(text: str, stops: list[str], cuts: list[int]):
    checker = StopChecker(stops)
    shown = "".join(checker.push(piece) for piece in pieces_of(text, cuts)) + checker.flush()
    assert shown == whole_cut(text, stops)
    assert checker.matched == any(stop in text for stop in stops)


@given(TEXT, STOPS)
def test_holds_back_less_than_the_longest_stop_string(text: str, stops: list[str]):
    checker = StopChecker(stops)
    shown = ""
    for end, character in enumerate(text, start=1):
        shown += checker.push(character)
        if checker.matched:
            break
        assert end - len(shown) <= max(map(len, stops), default=1) - 1


@pytest.mark.parametrize(("pieces", "expected"), [(["ab", "cd"], "a"), (["abcd"], "a"), (["a", "b", "c"], "a")])
def test_the_match_that_completes_first_wins(pieces: list[str], expected: str):
    checker = StopChecker(["abcd", "bc"])
    assert "".join(checker.push(piece) for piece in pieces) == expected
