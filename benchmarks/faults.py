"""Harm to the pool of a running server: one fault at a time, and the next once the pool is whole again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from typing import Any

import httpx

WHOLE_SECONDS = 90.0
COMMAND_SECONDS = 120.0
HANG_SECONDS = (0.3, 3.0)


class NotWhole(Exception):
    """The pool does not come back, or refuses what it should do."""


class Faults:
    """Faults at random to a pool of `workers` workers behind the API at `url`.

    current: what is going on, empty between two faults. done: how often each kind happened. recovery: the longest time,
    in seconds, until the pool was whole again, of each kind.
    """

    def __init__(self, url: str, workers: int, dice: random.Random) -> None:
        self._api = httpx.AsyncClient(base_url=url, timeout=COMMAND_SECONDS)
        self._workers = workers
        self._dice = dice
        self.current = ""
        self.done: Counter[str] = Counter()
        self.recovery: dict[str, float] = {}
        self._kinds = {
            "kill": self._kill,
            "hang": self._hang,
            "drain": self._drain,
            "scale": self._scale,
            "rebalance": self._rebalance,
        }

    async def run(self, count: int, seconds: float) -> None:
        """So many faults, spread over `seconds` unless the pool takes longer. Raises NotWhole."""
        kinds = [list(self._kinds)[index % len(self._kinds)] for index in range(count)]
        self._dice.shuffle(kinds)
        started = time.monotonic()
        for index, kind in enumerate(kinds):
            await asyncio.sleep(started + seconds * index / count - time.monotonic())
            began = time.monotonic()
            victim = self._dice.choice((await self.whole())["workers"])
            self.current = kind
            await self._kinds[kind](victim)
            await self.whole()
            self.current = ""
            self.done[kind] += 1
            self.recovery[kind] = max(self.recovery.get(kind, 0.0), time.monotonic() - began)
        await asyncio.sleep(started + seconds - time.monotonic())

    async def whole(self) -> dict[str, Any]:
        """GET /pool once every worker is ready, attached, and every expert is held. Raises NotWhole."""
        deadline = time.monotonic() + WHOLE_SECONDS
        while True:
            pool: dict[str, Any] = (await self._api.get("/pool")).json()
            workers = pool["workers"]
            well = [worker for worker in workers if worker["state"] == "ready" and worker["transport"]]
            if pool["coverage"] == 1 and len(workers) == len(well) == self._workers:
                return pool
            if time.monotonic() > deadline:
                states = ", ".join(f"{worker['name']} {worker['state']} {worker['detail']}" for worker in workers)
                raise NotWhole(f"{WHOLE_SECONDS:.0f} s after {self.current or 'the start'}: {states} {pool['problem']}")
            await asyncio.sleep(0.1)

    async def close(self) -> None:
        """End the connections."""
        await self._api.aclose()

    async def _kill(self, victim: dict[str, Any]) -> None:
        os.kill(victim["pid"], signal.SIGKILL)
        await self._wait_noticed(victim)

    async def _hang(self, victim: dict[str, Any]) -> None:
        os.kill(victim["pid"], signal.SIGSTOP)
        try:
            await asyncio.sleep(self._dice.uniform(*HANG_SECONDS))
        finally:
            with contextlib.suppress(ProcessLookupError):  # the pool may have replaced it
                os.kill(victim["pid"], signal.SIGCONT)

    async def _drain(self, victim: dict[str, Any]) -> None:
        """And put another worker in its place."""
        await self._command("drain", worker=victim["name"])
        await self._scale(victim)

    async def _scale(self, victim: dict[str, Any]) -> None:
        """One more, and back: a drained one goes first."""
        await self._command("scale", workers=self._workers + 1)
        await self._command("scale", workers=self._workers)

    async def _rebalance(self, victim: dict[str, Any]) -> None:
        await self._command("rebalance")

    async def _command(self, name: str, **body: Any) -> None:
        response = await self._api.post(f"/pool/{name}", json=body)
        if response.status_code != 200:
            raise NotWhole(f"{name} {body} was answered {response.status_code}: {response.text}")

    async def _wait_noticed(self, victim: dict[str, Any]) -> None:
        """A dead worker looks well for a moment."""
        deadline = time.monotonic() + WHOLE_SECONDS
        while time.monotonic() < deadline:
            workers = (await self._api.get("/pool")).json()["workers"]
            if all((worker["pid"], worker["state"]) != (victim["pid"], "ready") for worker in workers):
                return
            await asyncio.sleep(0.05)
        raise NotWhole(f"{victim['name']} is dead, and after {WHOLE_SECONDS:.0f} s nobody has noticed")
