"""`barista deploy`: engines and workers on a Ray cluster, for as long as this runs and beyond.

It submits a job to the cluster (router.deployment), submits it again when it ends, and replaces it when the order is
another one. It needs no Ray of its own, only the cluster's dashboard, so it runs anywhere. Two with the same order do
no harm: a job's name follows from the order, and Ray takes each name once. What serves outlives it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import shlex
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import typer

from barista.config import ServeConfig
from barista.errors import ConfigError
from barista.trust import TOKEN_VARIABLE, deployment_token
from router.deployment import flags, require_deployable
from router.ending import Ending
from router.log import log_to_stderr
from router.ray_api import Job, RayApi

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
FIRST_LOOK_SECONDS = 1.0  # until the job runs
STALL_SECONDS = 60.0  # without a look, `GET /healthz` says so
MAX_WAIT_SECONDS = 60.0
REMOVE_SECONDS = 180
LOG_LINES = 10


@dataclass(frozen=True, slots=True)
class Action:
    """What to do about the jobs now. stop: submission ids. submit: the id of a new job, if one is wanted."""

    stop: tuple[str, ...] = ()
    submit: str = ""


def next_action(jobs: Sequence[Job], pool: str, order: str) -> Action:
    """One job of this order is to run, and none of another order of the same pool.

    order: the entrypoint, of which the name holds a digest. A number follows it, because Ray wants a new name for each.
    """
    mark = hashlib.sha256(order.encode()).hexdigest()[:8]
    ours = jobs_of(pool, jobs)
    alive = [job for job in ours if not job.is_over]
    others = tuple(job.submission_id for job in alive if job.submission_id.split("-")[-2] != mark)
    if len(others) < len(alive):
        return Action(others)
    return Action(others, f"barista-{pool}-{mark}-{max(map(_number, ours), default=0) + 1}")


def jobs_of(pool: str, jobs: Sequence[Job]) -> list[Job]:
    """Those that `next_action` has named for this pool."""
    name = re.compile(rf"barista-{re.escape(pool)}-[0-9a-f]{{8}}-[0-9]+")
    return [job for job in jobs if name.fullmatch(job.submission_id)]


def _number(job: Job) -> int:
    return int(job.submission_id.rpartition("-")[2])


class Deployer:
    """order: the job's command line, which may change between two looks. environ: what the job gets beside it.

    Ray shows a job's environment to whoever has the cluster's token.
    """

    def __init__(self, api: RayApi, pool: str, order: str, environ: Mapping[str, str]) -> None:
        self.order = order
        self._api = api
        self._pool = pool
        self._environ = environ
        self._failures = 0
        self._not_before = 0.0
        self._said = ""
        self.looked_at = time.monotonic()
        self.settled = False  # the last look has found nothing to do
        self.reached = False  # the cluster has answered at least once
        self._relayed = "", 0  # a job, and how many of its lines have been said

    async def look(self, now: float) -> None:
        """One look at the cluster, and what follows from it. An error is told once and looked at again."""
        self.looked_at, self.settled = now, False
        try:
            jobs = await self._api.jobs()
            self.reached = True
            action = next_action(jobs, self._pool, self.order)
            for submission_id in action.stop:
                self._say(f"stopping {submission_id}: the order is another one now")
                await self._api.stop(submission_id)
            if action.submit and not action.stop and now >= self._not_before:
                await self._tell_why_over(jobs)
                self._not_before = now + min(MAX_WAIT_SECONDS, 2.0 ** min(self._failures, 10))
                self._failures += 1
                self._say(f"submitting {action.submit}: {self.order}")
                await self._api.submit(action.submit, self.order, self._environ)
            elif action == Action():
                self.settled = True
                await self._relay(jobs)
                if now > self._not_before + MAX_WAIT_SECONDS:
                    self._failures = 0
        except ConfigError as error:
            self._say(str(error))

    async def _relay(self, jobs: Sequence[Job]) -> None:
        """Say what the job has said since the last look."""
        job = next(job for job in jobs_of(self._pool, jobs) if not job.is_over)
        lines = (await self._api.logs(job.submission_id)).splitlines()
        if job.submission_id != self._relayed[0]:
            self._relayed = job.submission_id, 0
        for line in lines[self._relayed[1] :]:
            typer.echo(f"{job.submission_id}: {line}")
        self._relayed = job.submission_id, len(lines)

    async def remove(self) -> None:
        """Stop the pool's jobs and take down what they have left running. Raises ConfigError."""
        for job in jobs_of(self._pool, await self._api.jobs()):
            if not job.is_over:
                await self._api.stop(job.submission_id)
                await self._until_over(job.submission_id)
        name = f"barista-remove-{self._pool}-{int(time.time())}"
        await self._api.submit(name, shlex.join(["python", "-m", "experts.cluster.remove", self._pool]), {})
        job = await self._until_over(name)
        if job.status != "SUCCEEDED":
            raise ConfigError(
                f"The pool {self._pool} could not be removed: {job.message or job.status}.",
                f"See ray job logs {name}; then run it again.",
            )

    async def _until_over(self, submission_id: str) -> Job:
        for _ in range(REMOVE_SECONDS):
            await asyncio.sleep(1.0)
            job = next((job for job in await self._api.jobs() if job.submission_id == submission_id), None)
            if job is None or job.is_over:
                return job or Job(submission_id, "STOPPED", "the cluster does not know it any more")
        raise ConfigError(
            f"The job {submission_id} has not ended within {REMOVE_SECONDS} s.", "See ray job logs; then run it again."
        )

    async def _tell_why_over(self, jobs: Sequence[Job]) -> None:
        """The last lines of the newest job of ours, if it has failed."""
        failed = [job for job in jobs_of(self._pool, jobs) if job.status == "FAILED"]
        if failed:
            newest = max(failed, key=_number)
            lines = (await self._api.logs(newest.submission_id)).splitlines()[-LOG_LINES:]
            self._say("\n  ".join([f"{newest.submission_id} has failed:", *lines]))

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            typer.echo(text)


def order_of(config: ServeConfig, engines: int, engine_port: int) -> str:
    """The job's command line."""
    words = ["barista", "keep", *flags(config), "--engine-replicas", str(engines), "--engine-port", str(engine_port)]
    return shlex.join(words)


@dataclass(frozen=True, kw_only=True)
class DeployOptions:
    """What `barista deploy` is told beside the configuration of what it deploys.

    ray: URL of the cluster's dashboard. engines: how many. kubernetes: NAMESPACE/NAME of the release whose pods are
    told how the pool stands; empty elsewhere. health_port: of GET /healthz; None for none. groups: how worker pods are
    scaled, if they are: (group size, least, most), all in workers. sends_token: the deployment's, with the job;
    needless where the cluster's nodes have it in their environment.
    """

    ray: str
    engines: int
    engine_port: int
    kubernetes: str = ""
    health_port: int | None = None
    groups: tuple[int, int, int] | None = None
    sends_token: bool = True


def deploy(config: ServeConfig, options: DeployOptions, *, remove: bool = False) -> int:
    """Keep the deployment until a signal; returns the exit status. remove: take it down instead. Raises ConfigError."""
    log_to_stderr(config.log_level)
    api = RayApi(options.ray, os.environ)
    if remove:
        if config.pool is None:
            raise ConfigError("pool is not given, so nothing is removed.", "Give --pool NAME.")
        asyncio.run(Deployer(api, config.pool, "", {}).remove())
        typer.echo(f"removed: {config.pool}")
        return 0
    require_deployable(config, options.engines)
    assert config.pool is not None
    order = order_of(config, options.engines, options.engine_port)
    token = deployment_token(os.environ)
    deployer = Deployer(api, config.pool, order, {TOKEN_VARIABLE: token} if options.sends_token else {})
    return asyncio.run(_run(deployer, config, options))


async def _run(deployer: Deployer, config: ServeConfig, options: DeployOptions) -> int:
    ending = Ending()
    ending.watch(until_eof=False)
    ends: list[asyncio.Task[Any]] = [asyncio.create_task(event.wait()) for event in (ending.now, ending.drain)]
    async with contextlib.AsyncExitStack() as stack:
        if options.health_port is not None:
            await stack.enter_async_context(await _serve_health(deployer, options.health_port))
        if options.kubernetes:
            from router.pool_follower import follow_pool  # here, because nothing else needs Kubernetes

            def on_workers(workers: int) -> None:
                deployer.order = order_of(replace(config, workers=workers), options.engines, options.engine_port)

            following = asyncio.create_task(follow_pool(config, options.kubernetes, options.groups, on_workers))
            stack.callback(following.cancel)
            ends.append(following)
        while not any(task.done() for task in ends):
            await deployer.look(time.monotonic())
            seconds = LOOK_SECONDS if deployer.settled else FIRST_LOOK_SECONDS
            await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in ends:
            if task.done():
                await task  # raises what ended the following
    return 0


async def _serve_health(deployer: Deployer, port: int) -> asyncio.Server:
    """GET /healthz: its loop makes progress. GET /readyz: and the cluster has answered. Raises ConfigError."""
    try:
        return await asyncio.start_server(_answer_health(deployer), port=port)
    except OSError as error:
        raise ConfigError(f"health_port is {port}, which cannot be had: {error.strerror}.", "Give another.") from error


def _answer_health(deployer: Deployer) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError, ValueError):  # ValueError: a line too long
            line = await asyncio.wait_for(reader.readline(), 5.0)
            stalled = time.monotonic() - deployer.looked_at > STALL_SECONDS
            unready = line.startswith(b"GET /readyz") and not deployer.reached
            status = "503 Service Unavailable" if stalled or unready else "200 OK"
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
            await writer.drain()
        writer.close()

    return answer
