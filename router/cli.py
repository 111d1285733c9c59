"""The command line: `barista serve|chat|bench|status|drain|...`. Each command imports what it needs when it runs."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer
from rich.console import Console

import barista
from barista.errors import BaristaError
from router.commands import (
    bench,
    carve,
    chat,
    deploy,
    engine,
    inspect,
    models,
    node_labels,
    pool,
    precision,
    pull,
    serve,
    status,
)

app = typer.Typer(
    name="barista",
    help="Serve Mixture-of-Experts language models: the same cup every time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (serve, chat, bench, status, models, inspect, precision, pull, carve, engine, deploy):
    app.command(module.__name__.rpartition(".")[2])(module.command)
for command in (pool.drain, pool.scale, pool.rebalance):
    app.command(command.__name__)(command)
app.command("keep", hidden=True)(deploy.keep)
app.command("node-labels")(node_labels.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"barista {barista.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Show the version."),
) -> None:
    pass


def main() -> None:
    """Run the command line. Exit status: 0, 1 for an error with a remedy, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        app()
    except BaristaError as error:
        _fail(error.message, error.remedy)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `barista models | head`
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:  # the last resort: what the operating system refused, and where
        place = "" if error.filename is None else f": {error.filename}"
        _fail(f"{error.strerror or error}{place}")


def _fail(message: str, remedy: str = "") -> NoReturn:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"error: {message}", style="bold red", markup=False)
    if remedy:
        console.print(remedy, markup=False)
    sys.exit(1)


if __name__ == "__main__":
    main()
