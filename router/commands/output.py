"""Results on standard output: JSON for programs, plain columns for people and for `cut`."""

from __future__ import annotations

import json
from collections.abc import Sequence

import typer


def print_json(value: object) -> None:
    """The value as JSON, and nothing else."""
    typer.echo(json.dumps(value, indent=2))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under a header, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
