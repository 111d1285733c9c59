"""A report as JSON for programs, and as a table and sentences for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from barista.cache import size
from router.precision.figures import MISSION_KEPT, MISSION_SAVED, Estimate, Measured, Report

WIDEST = 1000  # characters, more than any table
COLUMNS = (
    "format",
    "memory",
    "saved",
    "a token reads",
    "perplexity",
    "change",
    "KL, nats/token",
    "same top-1",
    "other experts",
    "tokens/s",
)


def as_json(report: Report) -> dict[str, Any]:
    """Shares are of 1, sizes bytes, `memory_saved` a share of the reference's; errors are standard errors."""
    values = asdict(report)
    for entry, measured in zip(values["formats"], report.formats, strict=True):
        entry["memory_saved"] = report.saved(measured)
    return values | {"num_predicted": report.num_predicted}


def print_report(report: Report, console: Console) -> None:
    """The table is as wide as its cells, whatever the terminal: a row that wraps cannot be compared."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "format" else "right", no_wrap=True)
    table.add_row(*cells(report, report.reference), style="dim")
    for measured in report.formats:
        table.add_row(*cells(report, measured))
    console.width = max(console.width, console.measure(table, options=console.options.update(width=WIDEST)).maximum)
    console.print(table)
    for line in ("", *sentences(report)):
        console.print(Text(line), soft_wrap=True)


def cells(report: Report, measured: Measured) -> tuple[str, ...]:
    """One row; of the reference only what is not a comparison."""
    loss, is_reference = measured.loss, measured is report.reference
    compared = (percent(loss.perplexity_change, sign="+"), plain(loss.kl), percent(loss.same_top1))
    others = "" if loss.other_experts is None else f"{loss.other_experts:.1%}"
    saved = f"{report.saved(measured):.1%}"
    change, kl, top1 = ("", "", "") if is_reference else compared
    return (
        measured.format,
        size(measured.held_bytes),
        "" if is_reference else saved,
        size(measured.active_bytes),
        f"{loss.perplexity:.3f}",
        change,
        kl,
        top1,
        "" if is_reference else others,
        f"{measured.speed.median:.1f} ({measured.speed.slow:.1f} to {measured.speed.fast:.1f})",
    )


def sentences(report: Report) -> list[str]:
    """What the numbers are of, and how the mission's claim stands."""
    lines = [
        f"{report.model} ({report.family}) beside itself in {report.reference.format}, on {report.num_predicted:,} "
        f"tokens of {report.text}, in {report.num_windows} windows. ± is the standard error over the windows.",
        f"tokens/s: one sequence on {threads(report)}, median of single steps (10th to 90th percentile).",
    ]
    if report.reference.loss.other_experts is not None:
        lines.append("other experts: (token, layer) pairs for which the gate chose another set than the reference's.")
    lines += [claim(report, measured) for measured in report.formats]
    return lines + [f"{name} is left out: {reason}" for name, reason in report.skipped.items()]


def claim(report: Report, measured: Measured) -> str:
    """The mission's two shares, as measured."""
    saved, kept = report.saved(measured), measured.loss.same_top1.value
    verdict = "reached" if saved >= MISSION_SAVED and kept >= MISSION_KEPT else "not reached"
    goal = f"{MISSION_SAVED:.0%} less, {MISSION_KEPT:.0%} kept"
    return f"{measured.format}: {saved:.1%} less memory, {kept:.1%} of the top-1 choices kept ({goal}: {verdict})."


def threads(report: Report) -> str:
    """2 -> '2 threads'."""
    return f"{report.threads} thread{'s' * (report.threads > 1)}"


def percent(estimate: Estimate, *, sign: str = "") -> str:
    """0.0123 ± 0.0045 -> '1.23% ±0.45'; sign: "+" to show it always."""
    error = "" if estimate.error is None else f" ±{100 * estimate.error:.2f}"
    return f"{100 * estimate.value:{sign}.2f}%{error}"


def plain(estimate: Estimate) -> str:
    """0.0123 ± 0.0045 -> '0.0123 ±0.0045'."""
    error = "" if estimate.error is None else f" ±{estimate.error:.4f}"
    return f"{estimate.value:.4f}{error}"
