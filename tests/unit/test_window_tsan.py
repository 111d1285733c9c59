"""The protocols of windows under ThreadSanitizer, with a program that it must condemn beside each that it must not."""

from __future__ import annotations

import pytest

from tests.unit.tsan import program, run

REQUESTS = "5000"
CYCLES = "20000"


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    return program("window_tsan", tmp_path_factory.mktemp("window"))


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    return program("expert_parallel_tsan", tmp_path_factory.mktemp("group"))


def test_the_window_protocol_has_no_data_race(window):
    done = run([window, REQUESTS])
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{REQUESTS} requests\n")


def test_publishing_without_release_order_would_be_seen(window):
    done = run([window, REQUESTS, "relaxed"])
    assert "data race" in done.stderr
    assert done.returncode != 0


def test_a_group_of_ranks_has_no_data_race_and_no_row_too_early_or_too_late(group):
    done = run([group, CYCLES], timeout=180)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{CYCLES} cycles, 0 wrong\n")


def test_a_group_that_does_not_wait_for_its_experts_would_be_seen(group):
    done = run([group, "200", "unsynchronised"])
    assert "data race" in done.stderr
    assert done.returncode != 0
