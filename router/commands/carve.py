"""`barista carve`: a dense model in, a Mixture-of-Experts model out."""

from __future__ import annotations

from pathlib import Path

import typer


def command(
    source: str = typer.Argument(help="Dense Llama- or Qwen2/3-shaped model: a path or the name of a pulled model."),
    out: Path = typer.Argument(help="Folder to write; it must not exist."),
    expert_size: int | None = typer.Option(None, min=1, help="Neurons in one expert.", show_default="from the FFN"),
    shared: int | None = typer.Option(None, min=1, help="Experts that always run.", show_default="an eighth"),
    top_k: int | None = typer.Option(None, min=1, help="Routed experts per token.", show_default="six sevenths"),
    text: Path | None = typer.Option(None, help="UTF-8 text to calibrate on.", show_default="the one in the package"),
    max_tokens: int | None = typer.Option(None, min=1, help="Tokens of it to use."),
    force: bool = typer.Option(False, "--force", help="Replace OUT if it is an earlier carving."),
) -> None:
    """Split each FFN of a dense model into shared and routed experts, with a gate fitted to choose among them."""
    from barista.cache import size
    from router.carve import CarveOptions, carve
    from router.console import progress
    from router.models import resolve

    given = {"max_tokens": max_tokens} if max_tokens is not None else {}
    options = CarveOptions(expert_size=expert_size, num_shared=shared, top_k=top_k, text=text, force=force, **given)
    with progress(f"Carving {source}") as on_progress:
        report = carve(resolve(source), out, options=options, progress=on_progress)
    layout = report.layout
    typer.echo(
        f"{out}: {report.num_layers} layers of {layout.num_shared} shared and {layout.num_experts} routed experts of "
        f"{layout.expert_size} neurons, top-{layout.top_k}, {size(report.nbytes)}.\n"
        f"Calibrated on {report.num_tokens:,} tokens; {report.lost_energy:.1%} of the FFNs' energy is lost.\n"
        f"Serve it with: barista serve {out}",
        err=True,
    )
