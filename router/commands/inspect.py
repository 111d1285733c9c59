"""`barista inspect`: what a model costs, before it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from barista.config import FORMATS
from router.commands.output import print_json, print_table

if TYPE_CHECKING:
    from router.inspect import Inspection


def command(
    model: str = typer.Argument(help="A checkpoint's path, house-blend, or the name of a pulled model."),
    wanted: str = typer.Option("auto", "--format", help=f"Weight format in memory. One of {', '.join(FORMATS)}."),
    expert_memory: int | None = typer.Option(None, min=1, help="Bytes of experts in memory, as in `barista serve`."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON alone on stdout; sizes in bytes."),
) -> None:
    """Show a model's parameters, bytes per token and whether it fits this machine. Reads headers only."""
    from barista.errors import BaristaError, ConfigError
    from barista.machine import available_memory
    from experts.checkpoint import open_checkpoint
    from router.inspect import inspect_checkpoint
    from router.models import BUILT_IN, resolve

    if wanted not in FORMATS:
        raise ConfigError(f"format is {wanted!r}, which is unknown.", f"Give one of {', '.join(FORMATS)}.")
    path = resolve(model)
    if model == BUILT_IN and not path.exists():
        raise BaristaError(f"{BUILT_IN} is not carved yet.", f"Run: barista models --prepare {BUILT_IN}")
    inspection = inspect_checkpoint(open_checkpoint(path), available_memory(), wanted, expert_memory)
    if as_json:
        print_json({"model": model, "path": str(path), **vars(inspection)})
    else:
        _print(model, inspection)


def _print(model: str, figures: Inspection) -> None:
    from barista.cache import size

    experts = "none, a dense model"
    if figures.num_experts:
        experts = f"{figures.num_experts} routed in each of {figures.num_moe_layers} layers, top-{figures.top_k}"
        if figures.shared_intermediate_size:
            experts += f", shared FFN of {figures.shared_intermediate_size}"
    verdict = "fits" if figures.fits else "does not fit"
    stored = f"{size(figures.file_bytes)} stored as {figures.dtype}"
    held = f"{size(figures.held_bytes)} held in memory as {figures.format}"
    rows = [
        ("family", f"{figures.family}, {figures.num_layers} layers, computed in {figures.held_dtype}"),
        ("experts", experts),
        ("parameters", f"{_count(figures.parameters)}, of which a token uses {_count(figures.active_parameters)}"),
        ("weights", f"{stored}, {held}, of which a token reads {size(figures.active_bytes_per_token)}"),
        *([("format", f"{figures.format} ({figures.reason})")] if figures.reason else []),
        ("KV cache", f"{figures.kv_bytes_per_token:,} bytes per token"),
        ("context", f"{figures.max_model_len:,} tokens"),
        ("memory", f"{verdict}: needs {size(figures.memory_bytes)}, {size(figures.memory_available)} are free"),
    ]
    print_table(("model", model), rows)


def _count(parameters: int) -> str:
    """134515008 -> '134.5 M'."""
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
