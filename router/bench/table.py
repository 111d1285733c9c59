"""A run as people read it."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from router.bench.load import Load
from router.bench.report import Distribution, Slos, Summary


def table(summary: Summary, load: Load, slos: Slos) -> RenderableType:
    """Latencies as a table, and the other figures below it."""
    loop = (
        f"Closed loop, {load.concurrency} at a time"
        if load.rate is None
        else f"Poisson arrivals, {load.rate:g} a second"
    )
    figures = [Text(f"{name:<15}{text}") for name, text in _figures(summary, slos).items()]
    return Group(Text(loop + "\n"), _latencies(summary, open_loop=load.rate is not None), Text(""), *figures)


def _latencies(summary: Summary, *, open_loop: bool) -> Table:
    latencies = Table(box=None, pad_edge=False)
    latencies.add_column("milliseconds")
    for name in ("mean", "p50", "p90", "p99", "max"):
        latencies.add_column(name, justify="right")
    rows = {
        "time to first token (TTFT)": summary.ttft_ms,
        "time per output token (TPOT)": summary.tpot_ms,
        "inter-token latency (ITL)": summary.itl_ms,
        "end-to-end latency (E2EL)": summary.e2el_ms,
        "sent late by": summary.lag_ms if open_loop else None,
    }
    for name, row in rows.items():
        if row is not None:
            latencies.add_row(name, *_cells(row))
    return latencies


def _cells(row: Distribution) -> list[str]:
    return [f"{value:,.1f}" for value in (row.mean, row.p50, row.p90, row.p99, row.max)]


def _figures(summary: Summary, slos: Slos) -> dict[str, str]:
    """Name -> text, without latencies."""
    done = summary.completed
    length = f"{summary.total_output_tokens / done:.1f} out"
    if summary.total_input_tokens is not None:
        length = f"{summary.total_input_tokens / done:.1f} in, {length}"
    figures = {
        "requests": f"{done} answered, {summary.failed} failed, in {summary.duration:.1f} s",
        "throughput": f"{summary.request_throughput:.2f} requests/s, {summary.output_throughput:.1f} output tokens/s",
        "tokens": f"{length} per request, counted by {summary.counted_by}, {summary.chunk_tokens:.2f} per chunk",
    }
    if summary.request_goodput is not None and summary.goodput_share is not None:
        limits = ", ".join(f"{name} <= {limit:g} ms" for name, limit in slos.items())
        figures["goodput"] = f"{summary.request_goodput:.2f} requests/s, {summary.goodput_share:.1%} with {limits}"
    return figures | {kind: f"{count} failed" for kind, count in summary.failures.items()}
