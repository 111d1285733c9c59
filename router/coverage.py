"""Is every expert on a worker that the engine reaches? What readiness means once the experts have left the engine."""

from __future__ import annotations

import asyncio
import itertools
import logging

from barista.errors import BaristaError, EngineFailed, RequestError
from router.console import OnProgress
from router.engine_client import EngineClient
from router.messages import Stats
from router.pool_client import PoolClient
from router.pool_process import PoolProcess

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
POLLS_PER_PROBLEM = 20


def experts_uncovered(stats: Stats) -> int:
    """Experts that no worker in reach holds; 0 where they are in the engine itself."""
    return 0 if stats.pool is None else stats.pool.experts_uncovered


async def wait_covered(engine: EngineClient, pool: PoolProcess, on_progress: OnProgress) -> None:
    """Return when every expert is covered. Raises BaristaError if the keeper or the engine goes before.

    A problem that the controller names twice in a row is logged: more workers, or more memory, may have to come first.
    """
    total, problem, logged = 0, "", ""
    for poll in itertools.count(1):
        try:
            missing = experts_uncovered(await engine.stats())
        except EngineFailed as error:
            if not engine.ready:
                raise BaristaError(
                    "The engine died; the lines above may say why.", "Start the server again."
                ) from error
        else:
            if not missing:
                return
            total = max(total, missing)
            on_progress(1 - missing / total, f"{missing} experts on their way to their workers")
        if pool.died.is_set():
            raise pool.failure
        if poll % POLLS_PER_PROBLEM == 0:
            problem, before = await _problem(pool.client), problem
            if problem == before != logged:
                log.warning("Not ready yet: %s", problem or "experts are on their way again.")
                logged = problem
        await asyncio.sleep(POLL_SECONDS)


async def _problem(client: PoolClient) -> str:
    """Why coverage is not complete, in the controller's words; empty where it has none."""
    try:
        return (await client.state()).problem
    except RequestError:
        return ""
