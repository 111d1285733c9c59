"""`barista models`: what can be served without a download."""

from __future__ import annotations

import typer

from router.commands.output import print_json, print_table


def command(
    prepare: str | None = typer.Option(
        None, metavar="NAME", help="Make a built-in model now instead of at its first use."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON alone on stdout."),
) -> None:
    """List the models on this machine, with their sizes and families."""
    from barista.cache import size
    from router.models import BUILT_IN, local_models

    if prepare is not None:
        if prepare != BUILT_IN:
            raise typer.BadParameter(f"{prepare!r} is not built in; {BUILT_IN} is.", param_hint="--prepare")
        _prepare()
    elif as_json:
        print_json([{**vars(model), "path": str(model.path)} for model in local_models()])
    else:
        rows = [(m.name, m.source, m.family, size(m.nbytes) if m.nbytes else "", str(m.path)) for m in local_models()]
        print_table(("NAME", "SOURCE", "FAMILY", "SIZE", "PATH"), rows)


def _prepare() -> None:
    from router.console import progress
    from router.models import BUILT_IN, built_in_path, prepare_built_in

    if not built_in_path().exists():
        with progress(f"Carving {BUILT_IN}, once") as on_progress:
            prepare_built_in(on_progress)
    typer.echo(f"{BUILT_IN} is in {built_in_path()}", err=True)
