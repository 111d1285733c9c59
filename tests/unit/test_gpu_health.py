"""What is read of a GPU, and what follows from it: against the answers that tests/golden/nvml_*.json have."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from barista.errors import ConfigError
from experts.health import nvml as health_nvml
from experts.health.nvml import LINK_ERRORS, MAX_EVENTS, Nvml, open_nvml
from experts.health.reading import CLOCK_REASONS, EccErrors, GpuHealth, NvLink
from experts.health.verdict import (
    FATAL_XIDS,
    HEALTHY,
    RECOVERY_ACTIONS,
    SLOWDOWN_WEIGHTS,
    Condition,
    Verdict,
    judge,
    worst,
)
from tests.unit import fake_nvml
from tests.unit.fake_nvml import CONSTANTS, FakeNvml

WELL = GpuHealth(index=0, uuid="GPU-a")


def reading(name: str, gpu: int = 0) -> GpuHealth:
    return Nvml(FakeNvml(name)).read()[gpu]


# ---------------------------------------------------------------------- reading


def test_a_reading_is_what_nvml_answers() -> None:
    assert reading("h100_healthy") == GpuHealth(
        index=0,
        uuid="GPU-aaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaaaaaa",
        name="NVIDIA H100 80GB HBM3",
        memory_used_bytes=71 << 30,
        memory_total_bytes=85520809984,
        utilization=0.97,
        temperature=58,
        clock_reasons=0x4,
        ecc_corrected=EccErrors(0, 3),
        ecc_uncorrected=EccErrors(0, 0),
        rows_pending=False,
        rows_failed=False,
        nvlinks=(NvLink(active=True, errors=dict.fromkeys(LINK_ERRORS[:4], 0)),) * 18,
        recovery_action=0,
        xids=(),
    )


def test_what_a_gpu_does_not_support_is_none_and_disturbs_nothing_else() -> None:
    assert reading("consumer") == GpuHealth(
        index=0,
        uuid="GPU-11111111-1111-1111-1111-111111111111",
        name="NVIDIA GeForce RTX 4090",
        memory_used_bytes=20 << 30,
        memory_total_bytes=25757220864,
        utilization=0.55,
        temperature=63,
        slowdown_temperature=93,
        clock_reasons=0,
    )


FUNCTIONS = {
    "nvmlDeviceGetName": {"name"},
    "nvmlDeviceGetMemoryInfo": {"memory_used_bytes", "memory_total_bytes"},
    "nvmlDeviceGetUtilizationRates": {"utilization"},
    "nvmlDeviceGetTemperature": {"temperature"},
    "nvmlDeviceGetTemperatureThreshold": {"slowdown_temperature"},
    "nvmlDeviceGetCurrentClocksEventReasons": {"clock_reasons"},
    "nvmlDeviceGetTotalEccErrors": {"ecc_corrected", "ecc_uncorrected"},
    "nvmlDeviceGetRemappedRows": {"rows_pending", "rows_failed"},
    "nvmlDeviceGetNvLinkState": {"nvlinks"},
    "nvmlDeviceGetNvLinkErrorCounter": {"nvlinks"},
    "nvmlDeviceGetFieldValues": {"recovery_action"},
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("code", [2, 3, 10])
def test_one_refused_call_costs_only_its_own_fields(function: str, code: int) -> None:
    nvml = FakeNvml("a100_ecc")
    nvml.change("nvmlDeviceGetFieldValues", {"230": 0})
    whole = Nvml(nvml).read()[0]
    nvml.change(function, {"error": code})
    after = Nvml(nvml).read()[0]
    changed = {name for name in GpuHealth.__slots__ if getattr(whole, name) != getattr(after, name)} - {"xids"}
    assert changed == FUNCTIONS[function]


def test_the_errors_of_an_nvlink_that_is_down_are_not_asked_for() -> None:
    nvml = FakeNvml("a100_ecc")
    nvml.change("nvmlDeviceGetNvLinkState", {"0-2": 1, "3": 0, "4-11": 1})
    links = Nvml(nvml).read()[0].nvlinks
    assert links is not None
    assert [link.active for link in links] == [True] * 3 + [False] + [True] * 8
    assert links[3].errors == {}


def test_the_errors_of_all_nvlinks_are_added_up() -> None:
    nvml = FakeNvml("a100_ecc")
    nvml.change("nvmlDeviceGetNvLinkErrorCounter", {"0": {"0-3": 5, "4": {"error": 3}}, "1-11": {"0-3": 1, "4": 2}})
    assert Nvml(nvml).read()[0].nvlink_errors == 4 * 5 + 11 * (4 + 2)


def test_a_gpu_without_nvlink_has_no_count_of_their_errors() -> None:
    assert reading("consumer").nvlink_errors is None


def test_a_lost_gpu_keeps_its_name_and_its_xids_and_says_so() -> None:
    lost = reading("off_the_bus")
    assert lost == GpuHealth(
        index=0, uuid="GPU-ffffffff-ffff-ffff-ffff-ffffffffffff", xids=(79,), unreachable="GPU is lost"
    )


def test_a_lost_gpu_does_not_hide_its_neighbour() -> None:
    neighbour = reading("off_the_bus", gpu=1)
    assert (neighbour.unreachable, neighbour.temperature, neighbour.xids) == ("", 40, ())


def test_a_gpu_that_was_lost_before_the_start_is_read_as_lost() -> None:
    nvml = FakeNvml("h100_healthy")
    nvml.change("nvmlDeviceGetHandleByIndex", {"error": 16})
    first, second = Nvml(nvml).read()
    assert (first.index, first.uuid, first.unreachable) == (0, "", "GPU requires restart")
    assert second.unreachable == ""


# ---------------------------------------------------------------------- events


def test_xids_are_read_once_and_other_events_are_none() -> None:
    nvml = Nvml(FakeNvml("a100_ecc"))
    assert [gpu.xids for gpu in nvml.read()] == [(63, 94), ()]
    assert [gpu.xids for gpu in nvml.read()] == [(), ()]


def test_an_event_whose_gpu_cannot_be_told_is_every_gpus() -> None:
    fake = FakeNvml("h100_healthy")
    fake.report_xid(79, gpu=None)
    assert [gpu.xids for gpu in Nvml(fake).read()] == [(79,), (79,)]


def test_an_event_of_a_gpu_that_is_not_ours_is_not_ours() -> None:
    fake = FakeNvml("h100_healthy")
    fake.report_xid(79, gpu=1)
    assert [gpu.xids for gpu in Nvml(fake, ["0"]).read()] == [()]


def test_a_flood_of_events_does_not_hold_up_a_look() -> None:
    fake = FakeNvml("h100_healthy")
    for _ in range(MAX_EVENTS + 1):
        fake.report_xid(31)
    nvml = Nvml(fake)
    assert [len(nvml.read()[0].xids or ()) for _ in range(2)] == [MAX_EVENTS, 1]


def test_only_gpus_that_report_xids_are_registered() -> None:
    fake = FakeNvml("h100_healthy")
    fake.change("nvmlDeviceGetSupportedEventTypes", 0x1 | 0x2, gpu=1)
    assert [gpu.xids for gpu in Nvml(fake).read()] == [(), None]
    assert fake.registered == fake.devices[:1]


# ---------------------------------------------------------------------- opening


def test_gpus_are_named_by_index_or_uuid() -> None:
    gpus = Nvml(FakeNvml("h100_healthy"), ["1", "GPU-aaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaaaaaa"]).read()
    assert [gpu.index for gpu in gpus] == [1, 0]


@pytest.mark.parametrize("name", ["7", "GPU-unknown"])
def test_an_unknown_gpu_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        open_nvml([name], FakeNvml("h100_healthy"))


@pytest.mark.parametrize("code", [9, 12])
def test_without_a_driver_there_is_nothing_to_watch(code: int) -> None:
    assert open_nvml(nvml=FakeNvml("h100_healthy", init_error=code)) is None


def test_a_driver_that_refuses_is_told_with_its_words() -> None:
    with pytest.raises(ConfigError, match="version mismatch"):
        open_nvml(nvml=FakeNvml("h100_healthy", init_error=18))


def test_without_the_library_the_remedy_is_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(health_nvml.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="pip install nvidia-ml-py"):
        open_nvml()


def test_closing_twice_ends_nvml_once() -> None:
    fake = FakeNvml("h100_healthy")
    nvml = Nvml(fake)
    nvml.close()
    assert fake.closed
    fake.closed = False
    nvml.close()
    assert not fake.closed


def test_the_stand_in_has_the_constants_of_the_library() -> None:
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    constants = {name: getattr(pynvml, name) for name in CONSTANTS}
    assert constants | {"NVML_NVLINK_MAX_LINKS": 36} == CONSTANTS  # which grows with the generations


def test_the_library_has_every_function_that_is_asked_for() -> None:
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    asked = {*FUNCTIONS, *(name for name in vars(FakeNvml) if name.startswith("nvml"))}
    asked |= {name for file in fake_nvml.GOLDEN.glob("nvml_*.json") for name in _functions(file.stem[5:])}
    assert {name for name in asked if not callable(getattr(pynvml, name, None))} == set()


def _functions(name: str) -> set[str]:
    return {function for device in FakeNvml(name).devices for function in device.answers if function != "*"}


# ---------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("name", "condition", "reason"),
    [
        ("h100_healthy", Condition.HEALTHY, ""),
        ("consumer", Condition.HEALTHY, ""),
        ("h200_throttled", Condition.THERMAL, "hardware thermal slowdown at 91 °C"),
        ("a100_ecc", Condition.FATAL, "XID 94, a contained memory error"),
        ("off_the_bus", Condition.FATAL, "NVML does not reach it (GPU is lost)"),
    ],
)
def test_what_is_recorded_is_judged(name: str, condition: Condition, reason: str) -> None:
    verdict = judge(None, reading(name))
    assert verdict.condition is condition
    assert reason in verdict.reason


def test_a_power_cap_is_no_slowdown() -> None:
    assert judge(None, replace(WELL, clock_reasons=0x1 | 0x2 | 0x4 | 0x10)) == HEALTHY


@given(reasons=st.integers(0, 0x1FF))
def test_a_slowdown_weighs_as_much_as_its_heaviest_reason(reasons: int) -> None:
    verdict = judge(None, replace(WELL, clock_reasons=reasons))
    assert verdict.weight == min([w for bit, w in SLOWDOWN_WEIGHTS.items() if reasons & bit], default=1.0)
    assert (verdict.condition is Condition.THERMAL) == (0 < verdict.weight < 1)


def test_every_reason_that_lowers_the_weight_has_a_name() -> None:
    assert SLOWDOWN_WEIGHTS.keys() <= CLOCK_REASONS.keys()


@given(action=st.integers(1, 9))
def test_every_recovery_action_but_none_is_fatal_also_an_unknown_one(action: int) -> None:
    verdict = judge(None, replace(WELL, recovery_action=action))
    assert verdict.condition is Condition.FATAL
    assert RECOVERY_ACTIONS.get(action, f"recovery action {action}") in verdict.reason


@given(xids=st.lists(st.integers(1, 200)))
def test_an_xid_is_fatal_only_if_the_catalogue_asks_for_a_reset(xids: list[int]) -> None:
    verdict = judge(None, replace(WELL, xids=tuple(xids)))
    assert (verdict.condition is Condition.FATAL) == any(xid in FATAL_XIDS for xid in xids)


@pytest.mark.parametrize("xid", [13, 31, 43, 45, 63, 92])
def test_the_programs_own_faults_and_repaired_errors_are_not_fatal(xid: int) -> None:
    assert judge(None, replace(WELL, xids=(xid,))) == HEALTHY


def test_rows_that_wait_for_a_reset_are_not_fatal_and_failed_ones_are() -> None:
    assert judge(None, replace(WELL, rows_pending=True, rows_failed=False)) == HEALTHY
    assert judge(None, replace(WELL, rows_pending=True, rows_failed=True)).condition is Condition.FATAL


def with_errors(count: int | None) -> GpuHealth:
    return replace(WELL, ecc_uncorrected=EccErrors(volatile=count))


@given(old=st.none() | st.integers(0, 5), new=st.none() | st.integers(0, 5))
def test_uncorrectable_errors_are_fatal_where_they_grow(old: int | None, new: int | None) -> None:
    grown = old is not None and new is not None and new > old
    assert (judge(with_errors(old), with_errors(new)).condition is Condition.FATAL) == grown


def test_errors_from_before_the_first_look_are_not_held_against_a_gpu() -> None:
    assert judge(None, with_errors(7)) == HEALTHY


def test_another_gpus_errors_are_not_compared() -> None:
    assert judge(replace(with_errors(0), uuid="GPU-b"), with_errors(7)) == HEALTHY


def test_corrected_errors_are_only_counted() -> None:
    assert judge(WELL, replace(WELL, ecc_corrected=EccErrors(10**6, 10**9))) == HEALTHY


@given(st.lists(st.sampled_from([HEALTHY, Verdict(Condition.THERMAL, 0.5, "hot"), Verdict(Condition.FATAL, 0.0, "x")])))
def test_a_worker_is_as_well_as_its_worst_gpu(verdicts: list[Verdict]) -> None:
    assert worst(verdicts).weight == min([verdict.weight for verdict in verdicts], default=1.0)
