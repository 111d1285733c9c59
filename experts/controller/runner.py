"""Carries out what the pool's state asks for: describes the workers, loads, compares, releases, stops. asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from barista.errors import BaristaError
from barista.trust import Trust
from experts.controller import calls
from experts.controller.calls import CallFailed, WorkerCalls
from experts.controller.member import Member
from experts.controller.planning import tend
from experts.controller.reconcile import Action, Assign, Move, Probe, Release, Restart, Stop, ended, next_actions
from experts.controller.retirement import retire_failing
from experts.controller.state import Pool

log = logging.getLogger(__name__)

DESCRIBE_SECONDS = 0.5
RETRY_SECONDS = 0.1  # after a call that nobody took
RELOCATE_SECONDS = 2.0  # after a worker that cannot serve
PROBES_AT_ONCE = 8
TICK_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Location:
    """Where a worker serves, the node that it is on, and that node's wider failure domain."""

    address: str
    node: str
    domain: str = ""


class Workers(Protocol):
    """The processes behind the members: actors of a cluster, or a test's servers."""

    async def start(self, names: list[str]) -> None:
        """Make these workers. Raises BaristaError when they cannot be placed."""
        ...

    async def locate(self, name: str, capacity_bytes: int) -> Location:
        """Wait until the worker serves. capacity_bytes: what it had before it was restarted, 0 if that is unknown.

        Raises BaristaError when it cannot serve.
        """
        ...

    async def restart(self, name: str) -> None:
        """End a worker's process, in whatever state it is, so that another one takes its place."""
        ...

    async def move(self, name: str) -> None:
        """End a worker's process, so that one on other hardware takes its place; if there is none, on the same."""
        ...

    async def stop(self, name: str) -> None:
        """End a worker for good."""
        ...


class Runner:
    """One pool at work. `changed` wakes whoever watches it.

    probe_row: what `Probe` compares. stall_seconds: an Assign without a report for so long is given up.
    """

    def __init__(
        self,
        pool: Pool,
        workers: Workers,
        trust: Trust,
        probe_row: bytes,
        clock: Callable[[], float] = time.monotonic,
        stall_seconds: float = calls.STALL_SECONDS,
    ) -> None:
        self.pool = pool
        self.workers = workers
        self.clock = clock
        self._trust = trust
        self._probe_row = probe_row
        self._stall_seconds = stall_seconds
        self._calls: dict[str, WorkerCalls] = {}
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._news = asyncio.Condition()
        self._seen_revision = -1
        self._probing = asyncio.Semaphore(PROBES_AT_ONCE)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                await self._step()
        finally:
            tasks = [*self._followers.values(), *self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def wake(self) -> None:
        """Something has happened: look at the pool now."""
        self._wake.set()

    async def changed(self, revision: int, seconds: float = 3600.0) -> None:
        """Return when the pool is not at `revision` any more, or after `seconds`."""
        try:
            async with asyncio.timeout(seconds), self._news:
                await self._news.wait_for(lambda: self.pool.revision != revision)
        except TimeoutError:
            return

    async def forget(self, name: str) -> None:
        """A worker that is no more, or never was."""
        self.pool.remove(name, self.clock())
        follower = self._followers.pop(name, None)
        if follower is not None:
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)
        self.wake()

    async def _step(self) -> None:
        now = self.clock()
        for name in self.pool.members.keys() - self._followers.keys():
            follower = self._followers[name] = asyncio.create_task(self._follow(name))
            follower.add_done_callback(partial(self._follower_ended, name))
        tend(self.pool, now)
        retire_failing(self.pool, now)
        for action in next_actions(self.pool, now):
            self._spawn(self._carry_out(action))
        if self.pool.revision != self._seen_revision:
            self._seen_revision = self.pool.revision
            async with self._news:
                self._news.notify_all()
        try:
            async with asyncio.timeout(TICK_SECONDS):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self.wake()

    def _follower_ended(self, name: str, task: asyncio.Task[None]) -> None:
        """A follower ends with its worker. One that has failed is replaced at the next tick, not sooner."""
        if self._followers.get(name) is task:
            del self._followers[name]
        if not task.cancelled() and task.exception() is not None:
            log.error("The controller lost sight of %s.", name, exc_info=task.exception())

    # ------------------------------------------------------------------ following one worker

    async def _follow(self, name: str) -> None:
        """Find the worker, ask it how it is until it is gone, find it again."""
        while name in self.pool.members:
            member = self.pool.members[name]
            try:
                where = await self.workers.locate(name, member.capacity_bytes)
            except BaristaError as error:
                self.pool.cannot_serve(name, str(error), self.clock())
                await asyncio.sleep(RELOCATE_SECONDS)
                continue
            self.pool.located(name, where.address, where.node, where.domain)
            async with self._trust.aio_channel(where.address) as channel:
                self._calls[name] = WorkerCalls(channel, where.address, self._trust, self._stall_seconds)
                try:
                    await self._describe_until_gone(member)
                finally:
                    self._calls.pop(name, None)

    async def _describe_until_gone(self, member: Member) -> None:
        """Ends when the worker does not listen at its address any more."""
        worker = self._calls[member.name]
        misses = 0
        while self.pool.members.get(member.name) is member:
            changes = member.changes
            try:
                description = await worker.describe()
                misses = 0
                self.pool.described(member.name, description, self.clock(), asked_at=changes)
                if member.live and description.draining != member.draining:
                    await worker.drain(member.draining)
            except CallFailed as failure:
                misses += failure.gone
                self._miss(member, failure)
                if misses > 1 and not member.live:
                    return
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self.wake()
            await asyncio.sleep(DESCRIBE_SECONDS)

    def _miss(self, member: Member, failure: CallFailed) -> None:
        was_live = member.live
        self.pool.unreachable(member.name, str(failure), self.clock(), timeout=failure.silent)
        if was_live and not member.live:
            log.warning("%s is lost. %s", member.name, failure)
            self.wake()

    # ------------------------------------------------------------------ actions

    async def _carry_out(self, action: Action) -> None:
        """Do it; if that fails, it is not under way any more, and is tried again if it is still wanted."""
        error = ""
        often = isinstance(action, Probe | Release)
        try:
            match action:
                case Assign():
                    await self._assign(action)
                case Probe():
                    async with self._probing:
                        await self._probe(action)
                case Release():
                    await self._release(action)
                case Restart():
                    await self.workers.restart(action.worker)
                case Move():
                    await self.workers.move(action.worker)
                case Stop():
                    await self.workers.stop(action.worker)
                    await self.forget(action.worker)
        except (CallFailed, BaristaError) as failure:
            error = str(failure)
            log.log(
                logging.INFO if often else logging.WARNING,
                "%s: %s failed: %s",
                action.worker,
                type(action).__name__,
                error,
            )
        except Exception as failure:
            error = f"The controller failed: {failure!r}"
            log.exception("%s: %s failed", action.worker, type(action).__name__)
        if error and not isinstance(action, Assign):
            await asyncio.sleep(RETRY_SECONDS if often else RELOCATE_SECONDS)
        ended(self.pool, action, error, self.clock())

    async def _assign(self, action: Assign) -> None:
        worker = self._worker(action.worker)
        async with contextlib.aclosing(worker.assign(action.experts, self.pool.term, self.pool.epoch)) as reports:
            async for digests in reports:
                self.pool.loaded(action.worker, action.incarnation, digests, self.clock())
                self.wake()

    async def _probe(self, action: Probe) -> None:
        ours, theirs = await asyncio.gather(
            self._worker(action.worker).probe(action.expert, self._probe_row),
            self._worker(action.reference).probe(action.expert, self._probe_row),
        )
        layer, expert = action.expert
        fault = (
            ""
            if ours == theirs
            else f"Its row of expert {expert} of layer {layer} differs from that of {action.reference}, "
            "although the weights are the same. Check the node's hardware."
        )
        self.pool.proved(action.worker, action.incarnation, action.expert, fault, self.clock())

    async def _release(self, action: Release) -> None:
        await self._worker(action.worker).release(action.experts, self.pool.term, self.pool.epoch)
        self.pool.released(action.worker, action.incarnation, action.experts)

    def _worker(self, name: str) -> WorkerCalls:
        calls_of = self._calls.get(name)
        if calls_of is None:
            raise CallFailed("It is out of reach.", gone=True)
        return calls_of
