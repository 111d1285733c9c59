"""What two readings of a GPU mean for the worker on it: go on, do less, or move away."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from experts.health.reading import GpuHealth, reason_names


class Condition(enum.Enum):
    """HEALTHY: as it should be. THERMAL: right but slow. FATAL: not to be used until somebody has seen to it."""

    HEALTHY = enum.auto()
    THERMAL = enum.auto()
    FATAL = enum.auto()


@dataclass(frozen=True, slots=True)
class Verdict:
    """weight: how fast it is, 1 as it should be, 0 if it must not be used. reason: for people; empty when healthy."""

    condition: Condition = Condition.HEALTHY
    weight: float = 1.0
    reason: str = ""


HEALTHY = Verdict()

# nvmlDeviceGpuRecoveryAction_t of nvml.h, which NVML gives as field 230: what the driver itself thinks must be done.
RECOVERY_ACTIONS = {
    1: "a reset of the GPU",
    2: "a reboot of the node",
    3: "an end of all peer-to-peer traffic",
    4: "a drain and a reset of the GPU",
    5: "a recovery of the IMEX domain",
    6: "a reset of its bus",
    7: "a reboot of the system",
}

# Of NVIDIA's XID catalogue (docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html), what applies to the A100 or
# the H100 and has RESET_GPU or RESTART_BM as its immediate action; 48 and 74, whose text says that a reset is needed;
# and 94, after which the process must be restarted and the GPU reset when convenient. What asks for less is the
# program's own fault (13, 31, 43, 45, 69) or tells of nothing lost (63, 92). Those of newer NVLinks (144 to 150, 155)
# are fatal by a subcode that NVML's event lacks: the recovery action, which 154 announces, says which of them are.
FATAL_XIDS = {
    46: "the GPU stopped processing",
    48: "an uncorrectable memory error",
    62: "its micro-controller halted",
    64: "a memory row could not be remapped",
    74: "an error of NVLink",
    79: "it has fallen off the bus",
    94: "a contained memory error",
    95: "an uncontained memory error",
    109: "a timeout of a context switch",
    110: "a security fault",
    119: "a timeout of its system processor",
    120: "an error of its system processor",
    136: "the training of an NVLink failed",
    140: "an unrecovered memory error",
    143: "it could not be initialised",
    156: "a part of it was retired",
    158: "a fatal timeout",
}

# nvml.h: a hardware slowdown divides the clocks by 2 or more. It gives no factor for the software's, which is milder.
SLOWDOWN_WEIGHTS = {0x08: 0.5, 0x20: 0.75, 0x40: 0.5, 0x80: 0.5}


def judge(before: GpuHealth | None, now: GpuHealth) -> Verdict:
    """before: the last reading of the same GPU, None if this is the first. What is None in a reading is taken as well.

    A software power cap lowers no weight: a GPU at full work has it as a rule.
    """
    trouble = _fatal(before, now)
    if trouble:
        return Verdict(Condition.FATAL, 0.0, f"{_named(now)}: {trouble}.")
    reasons = now.clock_reasons or 0
    weights = [weight for bit, weight in SLOWDOWN_WEIGHTS.items() if reasons & bit]
    if not weights:
        return HEALTHY
    slowed = sum(bit for bit in SLOWDOWN_WEIGHTS if reasons & bit)
    heat = "" if now.temperature is None else f" at {now.temperature} °C"
    return Verdict(Condition.THERMAL, min(weights), f"{_named(now)}: {', '.join(reason_names(slowed))}{heat}.")


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Of all GPUs of one worker, which is as slow as its slowest; the first of equals. HEALTHY for none."""
    return min(verdicts, key=lambda verdict: verdict.weight, default=HEALTHY)


def _fatal(before: GpuHealth | None, now: GpuHealth) -> str:
    """Why it must not be used; empty if it may be."""
    if now.unreachable:
        return f"NVML does not reach it ({now.unreachable})"
    if now.recovery_action:
        action = RECOVERY_ACTIONS.get(now.recovery_action, f"recovery action {now.recovery_action}")
        return f"the driver asks for {action}"
    for xid in now.xids or ():
        if xid in FATAL_XIDS:
            return f"XID {xid}, {FATAL_XIDS[xid]}"
    if now.rows_failed:
        return "a memory row could not be remapped"
    grown = _growth(before, now)
    return f"{grown} new uncorrectable memory errors" if grown > 0 else ""


def _growth(before: GpuHealth | None, now: GpuHealth) -> int:
    """Uncorrectable errors since the last reading. A driver that was loaded anew counts from 0 again."""
    if before is None or before.uuid != now.uuid:
        return 0
    old, new = before.ecc_uncorrected.volatile, now.ecc_uncorrected.volatile
    return 0 if old is None or new is None else new - old


def _named(gpu: GpuHealth) -> str:
    return " ".join(filter(None, (f"GPU {gpu.index}" if gpu.index >= 0 else "GPU", gpu.uuid and f"({gpu.uuid})")))
