"""`barista deploy`, and the job that it submits, `barista keep`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from router.commands.serve import CONFIG, settings_of, with_serve_flags
from router.engine_port import ENGINE_PORT

ENGINES = typer.Option(1, min=1, help="How many engines.")
PORT = typer.Option(ENGINE_PORT, min=1, max=65535, help="Port of the engines, on every node that has one.")


@with_serve_flags
def command(
    config: Path | None = CONFIG,
    ray: str = typer.Option(..., help="URL of the Ray cluster's dashboard, such as http://head:8265."),
    engine_replicas: int = ENGINES,
    engine_port: int = PORT,
    remove: bool = typer.Option(False, "--remove", help="Take the deployment of this --pool down instead."),
    send_token: bool = typer.Option(
        True,
        help="Give the job BARISTA_POOL_TOKEN, which Ray then shows to whoever has its own token; needless where the "
        "cluster's nodes have it.",
    ),
    kubernetes: str = typer.Option(
        "", metavar="NAMESPACE/NAME", help="Tell the pods of this Helm release how the pool stands.", show_default="no"
    ),
    health_port: int | None = typer.Option(None, help="Answer GET /healthz here.", show_default="no"),
    group_size: int = typer.Option(1, min=1, help="With --max-workers: workers come and go so many at a time."),
    min_workers: int | None = typer.Option(None, min=1, help="With --max-workers: never fewer."),
    max_workers: int | None = typer.Option(
        None, min=1, help="With --kubernetes: scale worker pods by the waiting requests, up to so many workers."
    ),
    **flags: Any,
) -> None:
    """Run engines and workers of MODEL on a Ray cluster (--pool, --workers), and keep them as they were ordered.

    APIs find the engines with `barista serve MODEL --engines ...`. What was deployed outlives this command.
    """
    from router.deploy import DeployOptions, deploy

    groups = None if max_workers is None else (group_size, min_workers or group_size, max_workers)
    options = DeployOptions(
        ray=ray,
        engines=engine_replicas,
        engine_port=engine_port,
        kubernetes=kubernetes,
        health_port=health_port,
        groups=groups,
        sends_token=send_token,
    )
    raise typer.Exit(deploy(settings_of(config, flags), options, remove=remove))


@with_serve_flags
def keep(config: Path | None = CONFIG, engine_replicas: int = ENGINES, engine_port: int = PORT, **flags: Any) -> None:
    """What `barista deploy` runs as a job inside the Ray cluster."""
    from router.deployment import keep as keep_deployment

    raise typer.Exit(keep_deployment(settings_of(config, flags), engine_replicas, engine_port))
