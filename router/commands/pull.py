"""`barista pull`: the only command that reaches out to the network."""

from __future__ import annotations

import typer


def command(
    name: str = typer.Argument(help="The model's name on the hub, such as Qwen/Qwen3-30B-A3B."),
    tokenizer_only: bool = typer.Option(
        False, "--tokenizer-only", help="Leave the weights out, for `barista serve --engines`."
    ),
) -> None:
    """Download a model from the Hugging Face hub into the cache. Run again, it goes on where it stopped, or repairs."""
    from router.pull import pull

    typer.echo(f"{name} is in {pull(name, tokenizer_only=tokenizer_only)}", err=True)
