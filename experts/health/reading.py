"""One look at one GPU. What the GPU or its driver does not tell is None."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# nvmlClocksEventReasons of nvml.h: what lowers the clocks at present, but for idleness and what operators have set.
CLOCK_REASONS = {
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


@dataclass(frozen=True, slots=True)
class EccErrors:
    """Memory errors: `volatile` since the driver was loaded, `aggregate` over the life of the GPU."""

    volatile: int | None = None
    aggregate: int | None = None


@dataclass(frozen=True, slots=True)
class NvLink:
    """One NVLink. errors: how often each kind has happened: replay, recovery, crc_flit, crc_data, ecc_data."""

    active: bool
    errors: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuHealth:
    """One GPU. index: NVML's. Temperatures in °C, utilization 0..1.

    clock_reasons: bits of CLOCK_REASONS and others that matter less. rows_pending: memory rows wait for a reset to be
    remapped; rows_failed: one could not be. nvlinks: by number. recovery_action: nvmlDeviceGpuRecoveryAction_t, 0 for
    none. xids: the driver's error reports since the last look, None where there are no such events. unreachable: NVML's
    words for a GPU that does not answer any more; empty for one that does.
    """

    index: int
    uuid: str
    name: str | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    utilization: float | None = None
    temperature: int | None = None
    slowdown_temperature: int | None = None
    clock_reasons: int | None = None
    ecc_corrected: EccErrors = EccErrors()
    ecc_uncorrected: EccErrors = EccErrors()
    rows_pending: bool | None = None
    rows_failed: bool | None = None
    nvlinks: tuple[NvLink, ...] | None = None
    recovery_action: int | None = None
    xids: tuple[int, ...] | None = None
    unreachable: str = ""

    @property
    def nvlink_errors(self) -> int | None:
        """Of all links and kinds; None where no link tells."""
        counts = [count for link in self.nvlinks or () for count in link.errors.values()]
        return sum(counts) if counts else None


def reason_names(clock_reasons: int) -> list[str]:
    """The bits in words, lowest first."""
    return [name for bit, name in CLOCK_REASONS.items() if clock_reasons & bit]
