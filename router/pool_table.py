"""A pool as people read it: a summary, a row for each worker, and what has happened between two looks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from barista.cache import size

HEADER = (
    "WORKER",
    "STATE",
    "PID",
    "ADDRESS",
    "NODE",
    "EXPERTS",
    "REPLICAS",
    "WIRE",
    "ROWS",
    "LOAD",
    "LATENCY",
    "DETAIL",
)
Report = Mapping[str, Any]  # the JSON of GET /pool


def summary(report: Report) -> str:
    """The pool in a line or two."""
    if "experts_uncovered" not in report:
        return "There is no pool: the experts are in the engine, or on workers of its own on GPUs."
    name = f"pool {report['pool']}, " if report["pool"] else ""
    lines = [
        f"{name}epoch {report['epoch']}, coverage {report['coverage']:.1%}, {report['experts_uncovered']} experts "
        f"uncovered, {report['moves']} moves, {report['resends']} resends, {report['hedges']} hedges, busiest over "
        f"average worker {report['imbalance']:.2f}"
    ]
    return "\n".join([*lines, *filter(None, [report["problem"]])])


def rows(report: Report) -> list[tuple[str, ...]]:
    """One row for each worker, under HEADER. LOAD: its share of the rows that the engine has sent."""
    replicas = _replicas(report)
    total = sum(worker["rows"] for worker in report["workers"])
    return [_row(worker, replicas.get(worker["name"], 0), total) for worker in report["workers"]]


def changes(before: Report, after: Report) -> list[str]:
    """What happened between two reports: workers that came, went, died or changed their state; a new epoch."""
    old = {worker["name"]: worker for worker in before["workers"]}
    new = {worker["name"]: worker for worker in after["workers"]}
    events = [f"{name} is gone" for name in old.keys() - new.keys()]
    for name, worker in new.items():
        was = old.get(name)
        if was is None:
            events.append(f"{name} has come, {worker['state']}")
        elif was["state"] != worker["state"]:
            detail = f": {worker['detail']}" if worker["detail"] else ""
            events.append(f"{name} was {was['state']}, is {worker['state']}{detail}")
        elif was["pid"] != worker["pid"]:
            events.append(f"{name} died and is back: process {was['pid']}, now {worker['pid']}")
    if before["epoch"] != after["epoch"]:
        events.append(f"epoch {after['epoch']}, coverage {after['coverage']:.1%}")
    return events


def _replicas(report: Report) -> dict[str, int]:
    """Worker -> how many experts it holds."""
    counts: dict[str, int] = {}
    for layer in report.get("layers", ()):
        for names in layer["replicas"]:
            for name in names:
                counts[name] = counts.get(name, 0) + 1
    return counts


def _row(worker: Mapping[str, Any], replicas: int, total: int) -> tuple[str, ...]:
    held = f"{size(worker['bytes'])} of {size(worker['capacity_bytes'])}" if worker["capacity_bytes"] else "-"
    return (
        worker["name"],
        worker["state"],
        str(worker["pid"] or "-"),
        worker["address"] or "-",
        worker["node"] or "-",
        held,
        str(replicas),
        worker["transport"] or "-",
        f"{worker['rows']:,}",
        f"{worker['rows'] / total:.0%}" if total else "-",
        f"{worker['latency_ms']:.2f} ms" if worker["dispatches"] else "-",
        worker["detail"],
    )
