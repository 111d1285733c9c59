"""`barista drain|scale|rebalance`: what operators ask of a running server's pool."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import typer

from router.commands.output import print_json, print_table

URL = typer.Option("http://127.0.0.1:8000", help="The server's address.")
ADMIN_KEY = typer.Option(
    None, "--api-key", envvar="BARISTA_API_KEY", show_envvar=True, help="Admin key for that server."
)
JSON = typer.Option(False, "--json", help="Print JSON alone on stdout.")


def drain(
    worker: str | None = typer.Argument(None, help="The worker's name, such as worker-2: see barista status."),
    node: bool = typer.Option(False, "--node", help="Instead of one worker, all that runs on this Ray node."),
    timeout: float = typer.Option(600.0, min=1.0, help="With --node: give up after so many seconds."),
    url: str = URL,
    api_key: str | None = ADMIN_KEY,
    as_json: bool = JSON,
) -> None:
    """Move every expert off WORKER while serving goes on, and wait until that is done.

    With --node, run on a node of the Ray cluster that is about to go: its workers' experts move to other nodes, and its
    engine finishes what it has open.
    """
    if node == (worker is not None):
        raise typer.BadParameter("name a WORKER, or give --node", param_hint="WORKER")
    if node:
        raise typer.Exit(subprocess.run([sys.executable, "-m", "experts.cluster.drain", str(timeout)]).returncode)
    report = _post(url, api_key, "/pool/drain", {"worker": worker})
    _print(report, as_json, f"{worker} is drained: it holds nothing and gets no rows.")


def scale(
    workers: int = typer.Argument(min=1, help="How many workers there shall be."),
    url: str = URL,
    api_key: str | None = ADMIN_KEY,
    as_json: bool = JSON,
) -> None:
    """Start workers, or drain and stop them, until there are WORKERS, and wait until that is done."""
    report = _post(url, api_key, "/pool/scale", {"workers": workers})
    _print(report, as_json, f"The pool has {workers} worker{'s' * (workers > 1)}.")


def rebalance(
    dry_run: bool = typer.Option(False, "--dry-run", help="Show the moves and make none."),
    url: str = URL,
    api_key: str | None = ADMIN_KEY,
    as_json: bool = JSON,
) -> None:
    """Spread the experts' replicas over the workers by the load that was seen."""
    report = _post(url, api_key, "/pool/rebalance", {"dry_run": dry_run})
    balance = f"busiest over average worker: {report['imbalance_before']:.2f}, then {report['imbalance_after']:.2f}"
    count = len(report["moves"])
    _print(report, as_json, f"{count} move{'s' * (count != 1)}{' planned, none made' * dry_run}; {balance}.")
    if report["moves"] and not as_json:
        print_table(("LAYER", "EXPERT", "FROM", "TO"), [_move(move) for move in report["moves"]])


def _post(url: str, api_key: str | None, path: str, body: object) -> Any:
    from router.server_client import ServerClient

    with ServerClient(url, api_key) as client:
        return client.post(path, body)


def _print(report: Any, as_json: bool, line: str) -> None:
    if as_json:
        print_json(report)
    else:
        typer.echo(line)


def _move(move: dict[str, Any]) -> tuple[str, ...]:
    return str(move["layer"]), str(move["expert"]), move["from"] or "-", move["to"] or "-"
