"""What benchmarks.pool takes and how it tells what it found; measuring is left to the benchmark."""

from __future__ import annotations

import pytest

from benchmarks.belongings import SLACK, leaks
from benchmarks.pool import generate_row, parse, random_prompts, report
from benchmarks.wire import WireTimes, median_percentile, wire_row


def test_the_defaults_are_those_of_the_targets() -> None:
    args = parse([])
    assert (args.model, args.workers, args.threads, args.sequences) == ("house-blend", 2, 1, [1, 16])
    assert (args.transport, args.fault, args.json) == ("shm", False, False)


@pytest.mark.parametrize(
    "wrong", [["--workers", "0"], ["--sequences", "1,x"], ["--transport", "tcp"], ["--rounds", "-1"], ["model"]]
)
def test_wrong_arguments_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        parse(wrong)
    assert refusal.value.code == 2


def test_a_percentile_is_of_each_round_and_the_median_over_rounds() -> None:
    rounds = [[i * 1e-6 for i in range(1, 101)], [5e-6] * 100, [1.0]]
    assert median_percentile(rounds, 50) == pytest.approx(50)
    assert median_percentile(rounds, 99) == pytest.approx(99)


def test_what_is_above_the_compute_is_taken_call_by_call() -> None:
    times = WireTimes(call=[90e-6, 60e-6, 200e-6], compute=[10e-6, 50e-6, 100e-6])
    row = wire_row("shm", [times], [[20e-6]])
    assert row["calls"] == 3
    assert row["call_p50_us"] == pytest.approx(90)
    assert row["compute_p50_us"] == pytest.approx(50)
    assert row["above_p50_us"] == pytest.approx(80)  # of 80, 10 and 100; not 90 - 50
    assert row["above_p99_us"] == pytest.approx(100)
    assert row["above_local_p50_us"] == pytest.approx(70)


def test_the_ratio_is_the_median_of_the_rounds_ratios() -> None:
    row = generate_row(16, [10.0, 20.0, 90.0], [20.0, 10.0, 100.0])
    assert row == {"sequences": 16, "workers": 20.0, "local": 20.0, "ratio": 0.9}


def test_prompts_are_a_function_of_their_seed() -> None:
    assert random_prompts(2, 260, 7) == random_prompts(2, 260, 7) != random_prompts(2, 260, 8)
    assert all(10 <= token < 260 for prompt in random_prompts(2, 260, 7) for token in prompt)


def test_the_report_has_a_row_for_each_wire_and_number_of_sequences() -> None:
    times = WireTimes(call=[90e-6], compute=[10e-6])
    results = {
        "model": "house-blend", "workers": 2, "worker_threads": 1, "engine_threads": 2, "load": 0.5,
        "format": "int4",
        "wire": [wire_row("shm", [times], [[20e-6]]), wire_row("grpc", [times], [[20e-6]])],
        "generate": [generate_row(16, [70.0], [100.0])],
    }  # fmt: skip
    lines = report(results).splitlines()
    assert "| shm | 90 | 90 | 10 | 80 | 80 | 20 | 70 |" in lines
    assert "| 16 | 70.0 | 100.0 | 0.70x |" in lines
    assert sum(line.startswith("| grpc") for line in lines) == 1
    assert "killed" not in report(results)
    fault = {"streams": 8, "gap_s": 0.034, "gap_without_s": 0.005, "equal": False}
    assert "texts DIFFER" in report(results | {"fault": fault})


def test_windows_leak_from_the_first_one_and_threads_beyond_what_libraries_start() -> None:
    before = {"engine windows": 2, "engine threads": 20, "worker files": 50, "actors": 3}
    assert leaks(before, before) == []
    assert leaks(before, before | {"engine threads": 20 + SLACK, "worker files": 40, "actors": 2}) == []
    assert leaks(before, before | {"engine windows": 3}) == ["engine windows: 2 before the faults, 3 after"]
    assert leaks(before, before | {"engine threads": 21 + SLACK}) == [
        f"engine threads: 20 before the faults, {21 + SLACK} after"
    ]
