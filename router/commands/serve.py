"""`barista serve`: the flags are the fields of ServeConfig, so that each is written down once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import typer

from barista.config import TYPES, ServeConfig, load


def with_serve_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes **flags one typed flag per field of ServeConfig; flags not given arrive as None."""
    own = [p for p in Signature.from_callable(function, eval_str=True).parameters.values() if p.kind != p.VAR_KEYWORD]
    parameters = [_parameter(entry) for entry in fields(ServeConfig)] + own
    function.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # which Typer reads
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return function


def _parameter(entry: Field[Any]) -> Parameter:
    doc, shown, choices = (entry.metadata[name] for name in ("doc", "shown", "choices"))
    if choices:
        doc = f"{doc} One of {', '.join(choices)}."
    if entry.name == "model":
        declared = typer.Argument(None, metavar="MODEL", help=doc, show_default=shown)
    else:
        declared = typer.Option(None, f"--{entry.name.replace('_', '-')}", help=doc, show_default=shown)
    kind = TYPES[entry.name] | None
    return Parameter(entry.name, Parameter.POSITIONAL_OR_KEYWORD, default=declared, annotation=kind)


CONFIG = typer.Option(None, envvar="BARISTA_CONFIG", help="TOML file of these settings, named with _ for -.")


def settings_of(
    file: Path | None, flags: Mapping[str, Any], defaults: Mapping[str, object] | None = None
) -> ServeConfig:
    """What a command with these flags was told. defaults: as of barista.config.load. Raises ConfigError."""
    given = {name: value for name, value in flags.items() if value is not None}
    return load(file, os.environ, given, defaults or {})


@with_serve_flags
def command(
    config: Path | None = CONFIG,
    as_json: bool = typer.Option(
        False, "--json", help='Once ready, print {"url", "model"} alone on stdout; with --grpc-port also "grpc".'
    ),
    until_eof: bool = typer.Option(False, hidden=True, help="Stop when standard input closes."),
    **flags: Any,
) -> None:
    """Serve MODEL over an OpenAI-compatible API.

    Settings come from the --config file, then BARISTA_* variables, then flags; the last one wins.
    """
    settings = settings_of(config, flags)
    from router.launch import serve

    raise typer.Exit(serve(settings, as_json=as_json, until_eof=until_eof))
