"""Engines that run elsewhere, as one EngineClient: found, balanced, and outlived by the answers they were writing.

An answer's tokens depend on the model, the prompt and the seed alone. So when an engine is lost or drained, another one
goes on with its requests from the tokens that were drawn, and the client sees a pause and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncIterator, Callable, Iterable

import msgspec

from barista.errors import EngineFailed, InvalidRequest
from barista.trust import MAX_MESSAGE_BYTES, Trust
from router.engine_link import EngineLink
from router.engine_service import ENGINE_DRAINING
from router.engine_session import ENGINE_DEAD, dead
from router.merged_stats import merged
from router.messages import Failed, ModelInfo, PoolAddress, Stats, Submit, Token

log = logging.getLogger(__name__)

Source = Callable[[], AsyncIterator[frozenset[str]]]

RESUME_SECONDS = 120.0  # how long a request waits for an engine; one that is started anew loads its model meanwhile
PATIENCE_SECONDS = 5.0  # until a line says what is waited for; the next one comes after twice as long
MAX_TOKENS = (MAX_MESSAGE_BYTES - (1 << 16)) // 10  # of a prompt, at five bytes each; as much again may be drawn
MAX_ENGINES_LOST = 3  # by one request, which may be the reason


class Engines:
    """source: yields the addresses (host:port) where engines may be, anew whenever they change.

    trust: towards engines and their pool. token: its token. tokenizer: Tokenizer.digest of this API; empty for one that
    only looks.
    """

    def __init__(
        self, source: Source, trust: Trust, token: str, tokenizer: str, *, resume_seconds: float = RESUME_SECONDS
    ) -> None:
        self._source = source
        self._trust = trust
        self._token = token
        self._tokenizer = tokenizer
        self._resume_seconds = resume_seconds
        self._links: dict[str, tuple[EngineLink, asyncio.Task[None]]] = {}
        self._watch: asyncio.Task[None] | None = None
        self._change = asyncio.Event()  # the next one; each is set once
        self._open: dict[object, bool] = {}  # each request, and whether it has a token
        self._closed = False
        self.died = asyncio.Event()  # the end of the source; engines that are lost may come back

    async def start(self, on_progress: Callable[[float, str], None], pool: PoolAddress | None = None) -> None:
        """Look for engines, from now until `close`; returns when there is one."""
        self._watch = asyncio.create_task(self._follow())
        self._watch.add_done_callback(self._source_ended)
        on_progress(0.0, "waiting for an engine")
        begun, patience = time.monotonic(), PATIENCE_SECONDS
        while not self.ready:
            left = begun + patience - time.monotonic()
            change = asyncio.create_task(self._change.wait())
            done, _ = await asyncio.wait((change, self._watch), timeout=max(0, left), return_when=FIRST_COMPLETED)
            change.cancel()
            if self._watch in done:
                self._watch.result()  # raises
            if left <= 0:
                log.warning("There is no engine yet. %s", self._troubles())
                patience *= 2

    @property
    def ready(self) -> bool:
        """True while at least one engine takes requests."""
        return any(link.ready for link in self._all())

    @property
    def model(self) -> ModelInfo:
        """The model, as the engine with the least room has it. Raises EngineFailed while there is no engine."""
        models = [link.greeting.model for link in self._all() if link.ready and link.greeting is not None]
        if not models:
            raise EngineFailed("There is no engine.", status=503, code="loading", retry_after=1)
        return min(models, key=lambda model: model.max_model_len)

    def pool_address(self) -> PoolAddress | None:
        """Where the engines' pool has its controller; None while no engine is known. Raises InvalidRequest: no pool."""
        links = sorted(self._all(), key=lambda link: not link.ready)  # one that has gone may name what has gone, too
        link = next((link for link in links if link.greeting is not None), None)
        if link is None or link.greeting is None:
            return None
        if not link.greeting.controller:
            raise InvalidRequest("These engines hold their experts themselves: there is no pool.", code="no_workers")
        tls_dir = self._trust.tls_dir
        return PoolAddress(
            controller=link.greeting.controller, token=self._token, tls_dir=None if tls_dir is None else str(tls_dir)
        )

    async def submit(self, request: Submit) -> AsyncIterator[Token | Failed]:
        """As EngineClient.submit; goes on with another engine, of the same numerics, when one is lost."""
        if len(request.prompt_token_ids) > MAX_TOKENS:
            yield Failed(request.request_id, "context_length_exceeded", f"{MAX_TOKENS:,} tokens are all that fits.")
            return
        numerics, lost = "", 0
        this = object()
        self._open[this] = False
        try:
            while lost < MAX_ENGINES_LOST and (link := await self._choose(numerics)) is not None:
                session, greeting = link.session, link.greeting
                assert session is not None
                assert greeting is not None
                numerics = greeting.model.numerics_id
                drawn: list[int] = []
                async with contextlib.aclosing(session.submit(request)) as events:
                    async for event in events:
                        if isinstance(event, Failed):
                            if event.code not in (ENGINE_DEAD, ENGINE_DRAINING):
                                yield event
                                return
                            log.warning("The engine at %s has let go of a request; another one goes on.", link.address)
                            link.avoid(session)
                            lost += event.code == ENGINE_DEAD
                            break
                        self._open[this] = True
                        drawn.append(event.token_id)
                        yield event
                        if event.finish_reason is not None:
                            return
                request = msgspec.structs.replace(request, drawn_token_ids=(*request.drawn_token_ids, *drawn))
            yield dead(request.request_id)
        finally:
            del self._open[this]
            self._drop_unwanted()

    async def makes_progress(self) -> bool:
        """True: it is for whoever runs the engines to look after them."""
        return True

    async def stats(self) -> Stats:
        """As EngineClient.stats: of all engines together, and the requests of this API alone."""
        stats, running = await self.all_stats(), sum(self._open.values())
        return msgspec.structs.replace(
            stats, num_requests_running=running, num_requests_waiting=len(self._open) - running
        )

    async def all_stats(self) -> Stats:
        """Of all engines together, the requests of other APIs included. Raises EngineFailed if none answers."""
        links = [link for link in self._all() if link.ready]
        answers = await asyncio.gather(*(link.stats() for link in links), return_exceptions=True)
        if not any(isinstance(answer, Stats) for answer in answers):
            raise EngineFailed("No engine answers.", status=503, code="engine_busy")
        # What one said last stands for it while it is busy: a sum of counters must not fall.
        return merged([link.last_stats for link in links if link.last_stats is not None])

    async def close(self) -> None:
        """Detach from all engines. Every open request gets its Failed event."""
        self._closed = True
        self._changed()
        tasks = [task for _, task in self._links.values()]
        tasks += [] if self._watch is None else [self._watch]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _all(self) -> list[EngineLink]:
        return [link for link, _ in self._links.values()]

    async def _follow(self) -> None:
        async for addresses in self._source():
            for address in addresses - self._links.keys():
                link = EngineLink(address, self._trust, self._tokenizer)
                self._links[address] = link, asyncio.create_task(link.run(self._changed))
            for link in self._all():
                link.wanted = link.address in addresses
            self._changed()

    def _drop_unwanted(self) -> None:
        """Engines that the source no longer names, once their requests are done: one that drains may be such.

        One that still serves is kept until another one does: a source may be wrong for a moment, its health is not.
        """
        replaced = any(link.wanted and link.ready for link in self._all())
        for link in self._all():
            if not link.wanted and not link.num_open and (replaced or not link.ready):
                self._links.pop(link.address)[1].cancel()

    def _troubles(self) -> str:
        links = self._all()
        if not links:
            return "No address is known where one could be."
        return " ".join(f"{link.address}: {link.trouble or 'its model is loading, or it drains'}." for link in links)

    def _source_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            log.error("Engines are not looked for any more.", exc_info=task.exception())
            self.died.set()

    def _changed(self) -> None:
        self._drop_unwanted()
        self._change.set()
        self._change = asyncio.Event()

    async def _choose(self, numerics: str) -> EngineLink | None:
        """The engine for the next request, with these numerics if any are given; None if none comes in time."""
        try:
            async with asyncio.timeout(self._resume_seconds):
                while not self._closed and (link := least_busy(self._all(), numerics)) is None:
                    await self._change.wait()
        except TimeoutError:
            return None
        return None if self._closed else link


def least_busy(links: Iterable[EngineLink], numerics: str) -> EngineLink | None:
    """Of the ready ones the one with the fewest open requests of this API; the first address among equals.

    One that the source no longer names comes last. numerics: numerics_id that it must have; empty for any.
    """
    fitting = [
        link
        for link in links
        if link.ready and link.greeting is not None and numerics in ("", link.greeting.model.numerics_id)
    ]
    return min(fitting, key=lambda link: (not link.wanted, link.num_open, link.address), default=None)
