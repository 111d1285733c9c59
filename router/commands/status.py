"""`barista status`: a running server's workers, once or live."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

import typer

from router.commands.output import print_json, print_table
from router.commands.pool import JSON, URL

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from router.pool_table import Report
    from router.server_client import ServerClient

REFRESH_SECONDS = 0.5
READ_SECONDS = 10.0
EVENTS = 12  # lines of history
COLOURS = {"ready": "green", "lost": "red", "down": "red", "refused": "red", "suspect": "yellow"}


def command(
    url: str = URL,
    api_key: str | None = typer.Option(None, envvar="BARISTA_API_KEY", show_envvar=True, help="Key for that server."),
    as_json: bool = JSON,
    watch: bool = typer.Option(False, "--watch", help="Refresh until Ctrl-C; shows what happens to the workers."),
) -> None:
    """Show the workers of a running server: their state, replicas, load and latency."""
    if as_json and watch:
        raise typer.BadParameter("give --json or --watch, not both", param_hint="--watch")
    from router.server_client import ServerClient

    with ServerClient(url, api_key, READ_SECONDS) as client:
        report = client.get("/pool")
        if as_json:
            print_json(report)
        elif watch:
            from rich.console import Console

            _watch(client, report, Console())
        else:
            _print(report)


def _print(report: Report) -> None:
    from router.pool_table import HEADER, rows, summary

    typer.echo(summary(report))
    if report["workers"]:
        print_table(HEADER, rows(report))


def _watch(client: ServerClient, report: Report, console: Console) -> None:
    """Show the pool until Ctrl-C, also through a time in which the server does not answer."""
    from rich.live import Live

    from barista.errors import BaristaError
    from router.pool_table import changes

    events: deque[str] = deque(maxlen=EVENTS)
    with Live(_picture(report, events), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(REFRESH_SECONDS)
            try:
                before, report = report, client.get("/pool")
                news = changes(before, report)
            except BaristaError as error:
                news = [] if events and events[-1].endswith(str(error)) else [str(error)]
            events.extend(f"{time.strftime('%H:%M:%S')}  {event}" for event in news)
            live.update(_picture(report, events), refresh=True)


def _picture(report: Report, events: deque[str]) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from router.pool_table import HEADER, rows, summary

    table = Table(box=None, pad_edge=False)
    for name in HEADER:
        table.add_column(name, no_wrap=True)
    for worker, cells in zip(report["workers"], rows(report), strict=True):
        table.add_row(*map(Text, cells), style=_colour(worker))
    return Group(Text(summary(report)), Text(""), table, Text(""), *map(Text, events))


def _colour(worker: Any) -> str:
    return COLOURS.get(worker["state"], "cyan")
