"""One engine that runs elsewhere, seen from the API: attached while its health says SERVING, and again after a loss."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import grpc
import msgspec
from grpc_health.v1 import health_pb2, health_pb2_grpc

from barista import __version__
from barista.errors import EngineFailed
from barista.trust import Trust
from barista.v1 import engine_pb2 as pb
from barista.v1.engine_pb2_grpc import EngineStub
from router.engine_service import SERVICE
from router.engine_session import ENGINE_DEAD, EngineSession
from router.messages import Command, Event, Greeting, Stats, decode_event, encode

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
# What an address answers that has no engine, not yet, or none for us; anything else is worth a line.
SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.CANCELLED)


class EngineLink:
    """The engine at `address` (host:port), if there is one: `run` keeps up the connection until it is cancelled.

    tokenizer: Tokenizer.digest of this API; empty for any. An engine with another one, or of another version, is
    refused, and a warning says so once.
    """

    def __init__(self, address: str, trust: Trust, tokenizer: str) -> None:
        self.address = address
        self.greeting: Greeting | None = None
        self.trouble = ""  # why it could not be reached the last time
        self.session: EngineSession | None = None  # while it is attached
        self.wanted = True  # the source names it
        self.last_stats: Stats | None = None
        self._trust = trust
        self._tokenizer = tokenizer
        self._serving = False
        self._warned: set[str] = set()

    @property
    def ready(self) -> bool:
        """True while it is attached and takes new requests."""
        return self.session is not None and self._serving

    @property
    def num_open(self) -> int:
        """Requests of this API that it works on."""
        return 0 if self.session is None else self.session.num_open

    async def stats(self) -> Stats:
        """As EngineClient.stats."""
        if self.session is None:
            raise EngineFailed("The engine is not attached.", status=503, code=ENGINE_DEAD)
        self.last_stats = await self.session.stats()
        return self.last_stats

    def avoid(self, session: EngineSession) -> None:
        """This session has let go of a request: nothing more for it until the engine's health has changed.

        It may have been replaced since, for whoever reads an answer slowly.
        """
        if self.session is session:
            self._serving = False

    async def run(self, changed: Callable[[], None]) -> None:
        """Connect, attach, and connect again, until cancelled. changed: called when `ready` may have changed."""
        this = asyncio.current_task()
        assert this is not None
        while True:
            async with self._trust.aio_channel(self.address) as channel:
                try:
                    await self._follow(channel, changed)
                except grpc.aio.AioRpcError as error:
                    self.trouble = f"{error.code().name}: {error.details()}"
                    if error.code() not in SILENT:
                        self._warn(self.trouble)
                except _Refused as refusal:
                    self.trouble = str(refusal)
                    self._warn(self.trouble)
                except _Ended:
                    pass
                except Exception:  # whatever it is, the engine may be found again
                    log.exception("The connection to the engine at %s has failed.", self.address)
                finally:
                    self._serving = False
                    changed()
            # A task group forgets a cancellation when a task of it fails meanwhile (CPython 3.11), as a stream does.
            if this.cancelling():
                return
            await asyncio.sleep(RETRY_SECONDS)

    async def _follow(self, channel: grpc.aio.Channel, changed: Callable[[], None]) -> None:
        """Attach when the engine serves. Returns or raises when the connection, the attachment or its health is lost.

        An engine that drains stays attached: its open requests finish there.
        """
        health = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=SERVICE), metadata=self._trust.metadata
        )
        attachment: asyncio.Task[None] | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                async for reply in health:
                    self._serving = reply.status == health_pb2.HealthCheckResponse.SERVING
                    changed()
                    if self._serving and attachment is None:
                        attachment = tasks.create_task(self._attach(channel, changed))
        except* grpc.aio.AioRpcError as group:
            raise group.exceptions[0] from None
        except* (_Refused, _Ended) as group:
            raise group.exceptions[0] from None

    async def _attach(self, channel: grpc.aio.Channel, changed: Callable[[], None]) -> None:
        """One attachment, to its end. Raises AioRpcError when the engine ends it."""
        outgoing: asyncio.Queue[Command] = asyncio.Queue()
        session = EngineSession(outgoing.put_nowait)
        stream = EngineStub(channel).Attach(metadata=self._trust.metadata)
        writer = asyncio.create_task(_write(stream, outgoing))
        try:
            async for frame in stream:
                event = _decoded(frame.payload)
                if isinstance(event, Greeting):
                    self._check(event)
                    self.greeting, self.session = event, session
                    changed()
                else:
                    session.take(event)
            raise _Ended
        finally:
            self.session = None
            session.end()
            writer.cancel()
            stream.cancel()

    def _check(self, greeting: Greeting) -> None:
        if greeting.version != __version__:
            raise _Refused(f"it is of version {greeting.version}, this API of {__version__}: run one version")
        if self._tokenizer not in ("", greeting.tokenizer):
            raise _Refused("it serves a model with another tokenizer: give both the same MODEL")

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            log.warning("The engine at %s is not used: %s", self.address, text)


def _decoded(payload: bytes) -> Event:
    """Raises _Refused for what this version does not understand."""
    try:
        event: Event = decode_event(payload)
    except msgspec.MsgspecError as error:
        raise _Refused(f"it says what version {__version__} does not understand ({error}): run one version") from error
    return event


class _Refused(Exception):
    """There is an engine, but not one for us."""


class _Ended(Exception):
    """The engine has ended the attachment."""


async def _write(stream: grpc.aio.StreamStreamCall, outgoing: asyncio.Queue[Command]) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while True:
            await stream.write(pb.EngineFrame(payload=encode(await outgoing.get())))
