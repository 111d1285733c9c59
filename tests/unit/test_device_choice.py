"""The choice among products: the fastest one at each size, found once for each machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.device.choice import MARGIN, Case, Choice, Timings, choose, kept_choice

CASE = Case("a GPU", "2.13", "3.7", 7168, 2048, "fp8", "bf16")
FEW_ROWS, MANY_ROWS = {8: 1.0, 800: 9.0}, {8: 2.0, 800: 5.0}
BOTH = {"triton": FEW_ROWS, "grouped": MANY_ROWS}

SECONDS = st.floats(1e-6, 1.0)
TIMINGS = st.dictionaries(
    st.sampled_from(["grouped", "triton", "other"]),
    st.dictionaries(st.sampled_from([8, 128, 1024, 8192]), SECONDS, min_size=1),
    min_size=1,
)


def never() -> Timings:
    raise AssertionError("nothing was to be measured")


def works(name: str) -> bool:
    return True


def test_sizes_between_two_that_were_timed_belong_to_the_nearer_one() -> None:
    choice = choose(BOTH)
    assert choice == Choice(("triton", "grouped"), (80,))
    assert [choice.name(rows) for rows in (1, 8, 80, 81, 800, 10**6)] == ["triton"] * 3 + ["grouped"] * 3


@given(timings=TIMINGS)
def test_at_each_size_none_is_faster_by_more_than_the_margin(timings: Timings) -> None:
    choice = choose(timings)
    assert choice is not None
    for rows in {rows for times in timings.values() for rows in times}:
        best = min(times[rows] for times in timings.values() if rows in times)
        assert timings[choice.name(rows)][rows] * (1 - MARGIN) <= best


@given(timings=TIMINGS)
def test_neighbouring_ranges_differ(timings: Timings) -> None:
    choice = choose(timings)
    assert choice is not None
    assert all(one != other for one, other in zip(choice.names, choice.names[1:], strict=False))
    assert list(choice.bounds) == sorted(set(choice.bounds))


def test_a_small_gain_changes_nothing() -> None:
    assert choose({"triton": {8: 1.0, 800: 1.0}, "grouped": {8: 1.1, 800: 0.96}}) == Choice(("triton",))


def test_nothing_timed_is_no_choice() -> None:
    assert choose({"triton": {}}) is None


def test_a_machine_measures_once(tmp_path: Path) -> None:
    first = kept_choice(CASE, works, lambda: BOTH, tmp_path)
    assert first == choose(BOTH)
    assert kept_choice(CASE, works, never, tmp_path) == first


@pytest.mark.parametrize("change", [{"device": "another"}, {"torch": "2.12"}, {"triton": ""}, {"hidden": 1}])
def test_another_case_is_measured_anew(change: dict[str, object], tmp_path: Path) -> None:
    kept_choice(CASE, works, lambda: BOTH, tmp_path)
    assert kept_choice(replace(CASE, **change), works, lambda: {"grouped": MANY_ROWS}, tmp_path) == Choice(("grouped",))


def test_a_kept_product_that_no_longer_works_is_measured_anew(tmp_path: Path) -> None:
    kept_choice(CASE, works, lambda: BOTH, tmp_path)
    again = kept_choice(CASE, lambda name: name != "triton", lambda: {"grouped": MANY_ROWS}, tmp_path)
    assert again == Choice(("grouped",))


@pytest.mark.parametrize("text", ["", "{}", '{"choice": null}', '{"choice": {"names": [], "bounds": []}}'])
def test_a_damaged_entry_is_measured_anew(text: str, tmp_path: Path) -> None:
    kept_choice(CASE, works, lambda: BOTH, tmp_path)
    (file,) = tmp_path.glob("products/*/choice.json")
    file.write_text(text)
    assert kept_choice(CASE, works, lambda: BOTH, tmp_path) == choose(BOTH)


def test_an_entry_shows_people_what_was_measured(tmp_path: Path) -> None:
    kept_choice(CASE, works, lambda: BOTH, tmp_path)
    (file,) = tmp_path.glob("products/*/choice.json")
    value = json.loads(file.read_text())
    assert value["case"]["device"] == "a GPU"
    assert value["seconds"]["triton"] == {"8": 1.0, "800": 9.0}


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "products").write_text("not a folder")
    assert kept_choice(CASE, works, lambda: BOTH, tmp_path) == choose(BOTH)
