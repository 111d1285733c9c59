"""`barista bench`: latency, throughput and goodput of any OpenAI-compatible server under load."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from router.commands.output import print_json
from router.commands.pool import JSON, URL

if TYPE_CHECKING:
    from router.bench.client import BenchClient
    from router.bench.load import Load
    from router.bench.record import Record


def _positive(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is no positive, finite number.")
    return value


def command(
    url: str = URL,
    api_key: str | None = typer.Option(None, envvar="BARISTA_API_KEY", show_envvar=True, help="Key for that server."),
    model: str | None = typer.Option(None, help="Model to ask for.", show_default="the first of GET /v1/models"),
    rate: float | None = typer.Option(
        None, callback=_positive, help="Requests a second that arrive at random (Poisson), whatever the server does."
    ),
    concurrency: int | None = typer.Option(
        None, min=1, help="Or: users who each ask again once they are answered.", show_default="1, without --rate"
    ),
    duration: float = typer.Option(60.0, callback=_positive, help="Seconds in which requests are sent."),
    num_prompts: int | None = typer.Option(None, min=1, help="At most so many requests."),
    max_in_flight: int = typer.Option(512, min=1, help="With --rate: so many at once; the others wait, and it counts."),
    input_len: int = typer.Option(128, min=1, help="Tokens of a prompt; roughly, where there is no POST /tokenize."),
    output_len: int = typer.Option(128, min=1, help="Tokens of an answer."),
    seed: int = typer.Option(0, help="Of arrivals and prompts. A seed used before may find its prompts in a cache."),
    goodput: list[str] = typer.Option([], metavar="NAME:MS", help="An SLO for ttft, tpot or e2el. Repeat for others."),
    omit: list[str] = typer.Option([], metavar="FIELD", help="Field that the server refuses: ignore_eos, ..."),
    timeout: float = typer.Option(300.0, callback=_positive, help="Seconds for a whole answer."),
    as_json: bool = JSON,
) -> None:
    """Put a server under load; print TTFT, TPOT, inter-token and end-to-end latency, throughput and goodput.

    Prompts are random words; answers are greedy and of full length. One request before the clock starts must succeed.
    With --rate latency counts from a request's arrival, however late it was sent.
    Requests that fail are counted by kind and add to no latency. Ctrl-C prints what has been measured so far.
    """
    if rate is not None and concurrency is not None:
        raise typer.BadParameter("give --rate or --concurrency, not both", param_hint="--rate")
    from rich.console import Console

    from router.bench.client import BenchClient, chat_body, count_tokens
    from router.bench.load import Load
    from router.bench.measure import require_answers
    from router.bench.prompts import prompt, words_for
    from router.bench.report import parse_slos, summarise
    from router.bench.table import table
    from router.server_client import ServerClient

    slos = parse_slos(goodput)
    load = Load(
        rate=rate,
        concurrency=(concurrency or 1) if rate is None else None,
        duration=duration,
        num_prompts=num_prompts,
        max_in_flight=max_in_flight,
        seed=seed,
    )
    with ServerClient(url, api_key, timeout) as server:
        served = model or server.model()
        words = words_for(input_len, lambda text: count_tokens(server, served, text))
    client = BenchClient(server.url, api_key, chat_body(served, output_len, omit), timeout)
    title = f"Asking {served} at {server.url}"
    records, interrupted = _measure(client, load, lambda index: prompt(words, seed, index), title)
    require_answers(records)
    summary = summarise(records, slos)
    if as_json:
        lengths = {"input_len": input_len, "output_len": output_len}
        settings = {"url": server.url, "model": served, **asdict(load), **lengths, "slos_ms": slos}
        print_json({"settings": settings, "interrupted": interrupted, **asdict(summary)})
    else:
        Console(highlight=False).print(table(summary, load, slos))
    if interrupted:
        raise KeyboardInterrupt


def _measure(client: BenchClient, load: Load, prompt: Callable[[int], str], title: str) -> tuple[list[Record], bool]:
    """The records until the load is done, or until Ctrl-C, and whether it was that. Raises BaristaError as measure."""
    from router.bench.measure import measure
    from router.console import progress

    records: list[Record] = []
    with progress(title) as on_progress:

        def on_record(record: Record, fraction: float) -> None:
            records.append(record)
            on_progress(fraction, f"{len(records)} requests done")

        try:
            asyncio.run(measure(client, load, prompt, on_record))
        except KeyboardInterrupt:
            if not records:
                raise
            return records, True
    return records, False
