"""Carries out what the pool's state asks for: describes the workers, loads, compares, releases, stops. asyncio."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from barista.errors import BaristaError
from barista.placement import ExpertKey
from barista.trust import Trust
from barista.v1 import experts_pb2 as pb
from barista.v1.experts_pb2_grpc import ExpertsStub
from experts.controller.member import Member, Reach
from experts.controller.planning import tend
from experts.controller.reconcile import Action, Assign, Probe, Release, Stop, next_actions
from experts.controller.state import Pool
from experts.controller.wire import by_layer, description_of, digests_of

log = logging.getLogger(__name__)

DESCRIBE_SECONDS = 0.5
DESCRIBE_TIMEOUT = 2.0
RETRY_SECONDS = 0.1  # after a call that nobody took
RELOCATE_SECONDS = 2.0  # after a worker that cannot serve
CALL_TIMEOUT = 10.0
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

    async def stop(self, name: str) -> None:
        """End a worker for good."""
        ...


class Runner:
    """One pool at work. `changed` wakes whoever watches it. probe_row: what `Probe` compares."""

    def __init__(
        self,
        pool: Pool,
        workers: Workers,
        trust: Trust,
        probe_row: bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool = pool
        self.workers = workers
        self.clock = clock
        self._trust = trust
        self._probe_row = probe_row
        self._stubs: dict[str, ExpertsStub] = {}
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
            self._followers[name] = asyncio.create_task(self._follow(name))
        tend(self.pool, now)
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
        if not task.cancelled() and task.exception() is not None:
            log.error("The controller failed.", exc_info=task.exception())
        self.wake()

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
                self._stubs[name] = ExpertsStub(channel)
                try:
                    await self._describe_until_gone(member)
                finally:
                    self._stubs.pop(name, None)

    async def _describe_until_gone(self, member: Member) -> None:
        """Ends when nobody listens at its address any more."""
        stub = self._stubs[member.name]
        misses = 0
        while self.pool.members.get(member.name) is member:
            changes = member.changes
            try:
                reply = await stub.Describe(
                    pb.DescribeRequest(), timeout=DESCRIBE_TIMEOUT, metadata=self._trust.metadata
                )
                misses = 0
                self.pool.described(member.name, description_of(reply), self.clock(), asked_at=changes)
                if member.live and reply.draining != member.draining:
                    request = pb.DrainRequest(draining=member.draining)
                    await stub.Drain(request, timeout=DESCRIBE_TIMEOUT, metadata=self._trust.metadata)
            except grpc.aio.AioRpcError as error:
                gone = error.code() is grpc.StatusCode.UNAVAILABLE
                misses += gone
                self._miss(member, error)
                if misses > 1 and member.reach is not Reach.LIVE:
                    return
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self.wake()
            await asyncio.sleep(DESCRIBE_SECONDS)

    def _miss(self, member: Member, error: grpc.aio.AioRpcError) -> None:
        was_live = member.live
        silent = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        detail = "It does not answer." if silent else f"Nobody answers at {member.address}: {error.details()}"
        self.pool.unreachable(member.name, detail, self.clock(), timeout=silent)
        if was_live and not member.live:
            log.warning("%s is lost. %s", member.name, detail)
            self.wake()

    # ------------------------------------------------------------------ actions

    async def _carry_out(self, action: Action) -> None:
        match action:
            case Assign():
                await self._assign(action)
            case Probe():
                async with self._probing:
                    await self._probe(action)
            case Release():
                await self._release(action)
            case Stop():
                await self._stop(action)

    async def _assign(self, action: Assign) -> None:
        stub = self._stubs.get(action.worker)
        error = ""
        try:
            if stub is not None:
                request = pb.AssignRequest(term=self.pool.term, epoch=self.pool.epoch, experts=by_layer(action.experts))
                async for progress in stub.Assign(request, metadata=self._trust.metadata):
                    digests = digests_of(progress.loaded)
                    self.pool.loaded(action.worker, action.incarnation, digests, self.clock())
                    self.wake()
        except grpc.aio.AioRpcError as failure:
            error = failure.details() or failure.code().name
            log.warning("%s cannot load %d experts: %s", action.worker, len(action.experts), error)
        self.pool.assign_ended(action.worker, action.incarnation, error, self.clock())

    async def _probe(self, action: Probe) -> None:
        try:
            ours, theirs = await asyncio.gather(
                self._probe_one(action.worker, action.expert), self._probe_one(action.reference, action.expert)
            )
        except (grpc.aio.AioRpcError, KeyError):
            self.pool.probe_failed(action.worker, action.incarnation, action.expert)
            await asyncio.sleep(RETRY_SECONDS)
            return
        layer, expert = action.expert
        fault = (
            ""
            if ours == theirs
            else f"Its row of expert {expert} of layer {layer} differs from that of {action.reference}, "
            "although the weights are the same. Check the node's hardware."
        )
        self.pool.proved(action.worker, action.incarnation, action.expert, fault, self.clock())

    async def _probe_one(self, worker: str, key: ExpertKey) -> bytes:
        request = pb.ProbeRequest(layer=key[0], expert=key[1], row=self._probe_row)
        reply = await self._stubs[worker].Probe(request, timeout=CALL_TIMEOUT, metadata=self._trust.metadata)
        row: bytes = reply.row
        return row

    async def _release(self, action: Release) -> None:
        request = pb.ReleaseRequest(term=self.pool.term, epoch=self.pool.epoch, experts=by_layer(action.experts))
        try:
            await self._stubs[action.worker].Release(request, timeout=CALL_TIMEOUT, metadata=self._trust.metadata)
        except (grpc.aio.AioRpcError, KeyError):
            await asyncio.sleep(RETRY_SECONDS)
            self.pool.release_failed(action.worker, action.incarnation, self.clock())
            return
        self.pool.released(action.worker, action.incarnation, action.experts)

    async def _stop(self, action: Stop) -> None:
        await self.workers.stop(action.worker)
        await self.forget(action.worker)
