"""One run: a first request that must succeed, then the load."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from barista.errors import BaristaError
from router.bench.client import BenchClient
from router.bench.load import Load, run
from router.bench.record import Answer, Failure, Record

FIRST = -1  # the number of a prompt that the load does not use, so that no cache knows the load's


async def measure(
    client: BenchClient, load: Load, prompt: Callable[[int], str], on_record: Callable[[Record, float], None]
) -> None:
    """Send the load to the client's server, and close the client.

    prompt: a request's number -> its text. on_record: told of each record and of the part of the run, 0 to 1, that is
    over. Cancelling this ends the requests under way; they leave no record.

    Raises BaristaError: the server did not answer the first request, which is not part of the load.
    """
    async with client:
        first = await client.ask(prompt(FIRST), time.perf_counter())
        if isinstance(first, Failure):
            raise BaristaError(first.message, first.remedy)
        began = time.perf_counter()
        wanted = load.num_prompts or math.inf
        done = 0

        async def ask(index: int, start: float) -> bool:
            nonlocal done
            record = await client.ask(prompt(index), start)
            done += 1
            on_record(record, min(1.0, max((time.perf_counter() - began) / load.duration, done / wanted)))
            return isinstance(record, Answer)

        await run(load, ask)


def require_answers(records: Sequence[Record]) -> None:
    """Raise BaristaError, in the words of the first failure, unless there is an answer to report on."""
    failures = [record for record in records if isinstance(record, Failure)]
    if not records:
        raise BaristaError("No request arrived in that time.", "Give a longer --duration or a higher --rate.")
    if len(failures) == len(records):
        raise BaristaError(f"All {len(records)} requests failed; the first: {failures[0].message}", failures[0].remedy)
