"""`barista engine`: an engine for the APIs of other hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from router.commands.serve import CONFIG, settings_of, with_serve_flags
from router.engine_port import ENGINE_PORT


@with_serve_flags
def command(
    config: Path | None = CONFIG,
    until_eof: bool = typer.Option(False, hidden=True, help="Stop when standard input closes."),
    **flags: Any,
) -> None:
    """Run an engine of MODEL that serves the APIs started with --engines HOST:PORT (port 50051 unless told otherwise).

    Both ends show the token in BARISTA_POOL_TOKEN and, beyond this machine, the certificates in --tls-dir.
    """
    settings = settings_of(config, flags, {"port": ENGINE_PORT})
    from router.engine_host import serve_engine

    raise typer.Exit(serve_engine(settings, until_eof=until_eof))
