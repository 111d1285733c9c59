"""`barista precision`: what fewer bits cost a model, measured."""

from __future__ import annotations

from pathlib import Path

import typer

from barista.config import FORMATS
from barista.machine import usable_cores
from router.commands.output import print_json


def command(
    model: str = typer.Argument(help="A checkpoint's path, house-blend, or the name of a pulled model."),
    formats: str | None = typer.Option(
        None,
        metavar="NAME,...",
        help=f"Formats to measure, of {', '.join(FORMATS)}.",
        show_default="every one that the model's shapes take",
    ),
    reference: str | None = typer.Option(
        None, metavar="NAME", help="Format to compare with.", show_default="as stored, decoded where it is of few bits"
    ),
    text: Path | None = typer.Option(None, help="UTF-8 text to read.", show_default="Python's language reference"),
    tokens: int = typer.Option(4096, min=2, help="Tokens of it to read, spread over all of it in windows of 512."),
    threads: int = typer.Option(usable_cores, min=1, help="Threads to compute with.", show_default="the usable cores"),
    picture: Path | None = typer.Option(None, metavar="FILE.svg", help="Draw a picture of the result."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON alone on stdout; sizes in bytes, shares of 1."),
) -> None:
    """Measure what fewer bits cost: memory, perplexity, KL divergence, agreement and speed."""
    from rich.console import Console

    from barista.errors import ConfigError
    from router.console import progress
    from router.models import BUILT_IN, prepare_built_in, resolve
    from router.precision import Options, compare_formats, report
    from router.precision.picture import draw
    from router.precision.text import read_text

    if picture is not None and not picture.parent.is_dir():
        raise ConfigError(f"--picture {picture}: there is no folder {picture.parent}.", "Make it, or name another one.")
    options = Options(
        text=read_text(text),
        num_tokens=tokens,
        threads=threads,
        formats=None if formats is None else formats.split(","),
        reference=reference,
    )
    path = resolve(model)
    if model == BUILT_IN and not path.exists():
        with progress(f"Carving {BUILT_IN}, once") as on_progress:
            prepare_built_in(on_progress)
    with progress(f"Measuring {model}") as on_progress:
        measured = compare_formats(model, path, options, on_progress)
    if picture is not None:
        picture.write_text(draw(measured), encoding="utf-8")
    if as_json:
        print_json(report.as_json(measured))
    else:
        report.print_report(measured, Console())
