"""Engines that run apart, over real gRPC: found, balanced, and outlived by the answers that they were writing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import grpc
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from barista import __version__
from barista.errors import EngineFailed, InvalidRequest
from barista.trust import Trust
from router import engine_link
from router.engine_link import EngineLink
from router.engine_service import EngineService
from router.engines import MAX_ENGINES_LOST, Engines
from router.merged_stats import merged
from router.messages import (
    ExpertCacheStats,
    Failed,
    Greeting,
    LinkStats,
    PoolStats,
    SamplingParams,
    Stats,
    Submit,
    Token,
)
from tests.unit.fake_engine import FakeEngine, random_tokens

TRUST = Trust("secret")
LONG = SamplingParams(max_tokens=40, ignore_eos=True)
PROMPT = (1, 2, 3)


@dataclass
class Running:
    """A fake engine behind a real server."""

    engine: FakeEngine
    service: EngineService
    server: grpc.aio.Server
    address: str

    async def kill(self) -> None:
        await self.server.stop(None)


@contextlib.asynccontextmanager
async def running(
    *, trust: Trust = TRUST, version: str = __version__, tokenizer: str = "t", controller: str = "", **engine: Any
) -> AsyncIterator[Running]:
    fake = FakeEngine(**engine)
    greeting = Greeting(version=version, model=fake.model, tokenizer=tokenizer, controller=controller)
    service = EngineService(fake, lambda: greeting)
    server, port = await service.serve(trust, "127.0.0.1:0")
    await service.set_serving()
    try:
        yield Running(fake, service, server, f"127.0.0.1:{port}")
    finally:
        await server.stop(None)


class Addresses:
    """A source of addresses that a test changes."""

    def __init__(self, *addresses: str) -> None:
        self._queue: asyncio.Queue[frozenset[str]] = asyncio.Queue()
        self.set(*addresses)

    def set(self, *addresses: str) -> None:
        self._queue.put_nowait(frozenset(addresses))

    async def __call__(self) -> AsyncIterator[frozenset[str]]:
        while True:
            yield await self._queue.get()


@contextlib.asynccontextmanager
async def engines_at(source: Addresses, *, wait: bool = True, resume_seconds: float = 10.0) -> AsyncIterator[Engines]:
    engines = Engines(source, TRUST, "secret", "t", resume_seconds=resume_seconds)
    starting = asyncio.create_task(engines.start(lambda fraction, message: None))
    try:
        if wait:
            await asyncio.wait_for(starting, 10)
        yield engines
    finally:
        starting.cancel()
        await engines.close()


async def collect(engines: Engines, name: str = "r", sampling: SamplingParams = LONG) -> list[Token | Failed]:
    return [event async for event in engines.submit(Submit(name, PROMPT, sampling))]


def token_ids(events: list[Token | Failed]) -> list[int]:
    """Of an answer that came whole: every index once, in order, and the end last."""
    assert all(isinstance(event, Token) for event in events), events
    tokens = [event for event in events if isinstance(event, Token)]
    assert [token.index for token in tokens] == list(range(len(tokens)))
    assert [token.finish_reason is not None for token in tokens] == [False] * (len(tokens) - 1) + [True]
    return [token.token_id for token in tokens]


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def settled() -> None:
        try:
            await asyncio.wait_for(body(), 30)
        finally:
            # What grpc.aio still has to say to this event loop must not reach the next one, where it would be an error.
            gc.collect()
            await asyncio.sleep(0.02)

    asyncio.run(settled())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def alone(sampling: SamplingParams = LONG) -> list[int]:
    """What one engine says that nothing happens to."""
    return list(random_tokens(Submit("r", PROMPT, sampling)))[: sampling.max_tokens]


def test_the_answer_is_the_engines_own() -> None:
    async def body() -> None:
        async with running() as one, engines_at(Addresses(one.address)) as engines:
            assert token_ids(await collect(engines)) == alone()
            assert engines.model == one.engine.model

    run(body)


@pytest.mark.parametrize("after", [0, 1, 17, 39])
def test_an_answer_outlives_the_engine_that_was_writing_it(after: int) -> None:
    async def body() -> None:
        gates = [asyncio.Event(), asyncio.Event()]
        async with (
            running(gate=gates[0], gate_at=after) as one,
            running(gate=gates[1], gate_at=after) as two,
            engines_at(Addresses(one.address, two.address)) as engines,
        ):
            await until(lambda: len(ready(engines)) == 2)
            answer = asyncio.create_task(collect(engines))
            await until(lambda: bool(one.engine.submitted or two.engine.submitted))
            await asyncio.sleep(0.1)
            first, second = (one, two) if one.engine.submitted else (two, one)
            await first.kill()
            gates[0].set()
            gates[1].set()
            assert token_ids(await answer) == alone()
            (resumed,) = second.engine.submitted
            assert list(resumed.drawn_token_ids) == alone()[:after]

    run(body)


def ready(engines: Engines) -> list[EngineLink]:
    return [link for link in engines._all() if link.ready]


def test_a_lost_engine_that_comes_back_at_its_address_goes_on_itself() -> None:
    async def body() -> None:
        gate = asyncio.Event()
        async with running(gate=gate, gate_at=5) as one, engines_at(Addresses(one.address)) as engines:
            answer = asyncio.create_task(collect(engines))
            await until(lambda: bool(one.engine.submitted))
            await asyncio.sleep(0.1)
            await one.kill()
            await asyncio.sleep(0.2)
            assert not engines.ready
            again = EngineService(
                one.engine, lambda: Greeting(version=__version__, model=one.engine.model, tokenizer="t")
            )
            server, _ = await again.serve(TRUST, one.address)
            await again.set_serving()
            gate.set()
            assert token_ids(await answer) == alone()
            await server.stop(None)

    run(body)


def test_an_engine_of_other_numerics_does_not_go_on() -> None:
    async def body() -> None:
        gate = asyncio.Event()
        async with running(gate=gate, gate_at=5) as one, running(numerics_id="other") as two:
            source = Addresses(one.address)
            async with engines_at(source, resume_seconds=0.3) as engines:
                answer = asyncio.create_task(collect(engines))
                await until(lambda: bool(one.engine.submitted))
                source.set(one.address, two.address)
                await until(lambda: len(ready(engines)) == 2)
                await one.kill()
                *tokens, last = await answer
                assert len(tokens) == 5
                assert isinstance(last, Failed)
                assert last.code == "engine_dead"
                assert not two.engine.submitted

    run(body)


def test_a_request_that_ends_every_engine_ends() -> None:
    async def body() -> None:
        async with running(fail=3, fail_code="engine_dead") as one:
            source = Addresses(one.address)
            async with engines_at(source) as engines:
                answer = asyncio.create_task(collect(engines))
                for number in range(1, MAX_ENGINES_LOST):
                    await until(lambda number=number: len(one.engine.submitted) == number)
                    await until(lambda: not engines.ready)
                    await one.service._health.set("barista.v1.Engine", 2)  # as one that restarts does
                    await asyncio.sleep(0.05)
                    await one.service.set_serving()
                *_, last = await answer
                assert isinstance(last, Failed)
                assert len(one.engine.submitted) == MAX_ENGINES_LOST

    run(body)


def test_a_failure_of_the_request_itself_is_told_and_not_tried_elsewhere() -> None:
    async def body() -> None:
        async with running(fail=2, fail_code="nonfinite") as one, engines_at(Addresses(one.address)) as engines:
            *_, last = await collect(engines)
            assert isinstance(last, Failed)
            assert last.code == "nonfinite"
            assert len(one.engine.submitted) == 1

    run(body)


def test_a_drained_engine_finishes_what_it_has_and_gets_nothing_new() -> None:
    async def body() -> None:
        gate = asyncio.Event()
        async with running(gate=gate, gate_at=5) as one, running() as two:
            source = Addresses(one.address)
            async with engines_at(source) as engines:
                old = asyncio.create_task(collect(engines, "old"))
                await until(lambda: bool(one.engine.submitted))
                draining = asyncio.create_task(one.service.drain(10.0))
                await until(lambda: not engines.ready)
                source.set(one.address, two.address)
                assert token_ids(await collect(engines, "new")) == alone()
                assert len(one.engine.submitted) == len(two.engine.submitted) == 1
                assert not draining.done()
                gate.set()
                assert token_ids(await old) == alone()
                await draining
                assert len(two.engine.submitted) == 1

    run(body)


def test_what_a_drained_engine_has_not_finished_in_time_goes_on_elsewhere() -> None:
    async def body() -> None:
        gate = asyncio.Event()
        async with running(gate=gate, gate_at=5) as one, running() as two:
            source = Addresses(one.address)
            async with engines_at(source) as engines:
                answer = asyncio.create_task(collect(engines))
                await until(lambda: bool(one.engine.submitted))
                source.set(one.address, two.address)
                await one.service.drain(0.1)
                assert token_ids(await answer) == alone()
                assert two.engine.submitted[0].drawn_token_ids == tuple(alone()[:5])

    run(body)


def test_an_engine_that_drains_keeps_its_requests_when_its_address_is_no_longer_named() -> None:
    async def body() -> None:
        gate = asyncio.Event()
        async with running(gate=gate, gate_at=5) as one, running() as two:
            source = Addresses(one.address)
            async with engines_at(source) as engines:
                answer = asyncio.create_task(collect(engines))
                await until(lambda: bool(one.engine.submitted))
                source.set(two.address)
                await until(lambda: two.address in [link.address for link in ready(engines)])
                assert token_ids(await collect(engines, "new")) == alone()
                assert len(two.engine.submitted) == 1
                gate.set()
                assert token_ids(await answer) == alone()
                assert len(one.engine.submitted) == len(two.engine.submitted) == 1
                assert [link.address for link in engines._all()] == [two.address]

    run(body)


def test_a_source_that_is_empty_for_a_moment_takes_no_engine_away() -> None:
    async def body() -> None:
        async with running() as one:
            source = Addresses(one.address)
            async with engines_at(source) as engines:
                source.set()
                await asyncio.sleep(0.1)
                assert token_ids(await collect(engines)) == alone()
                await one.kill()
                await until(lambda: not engines._all())  # now it is gone, and nobody names it

    run(body)


def test_a_link_ends_when_it_is_told_to_although_its_stream_fails_in_the_same_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attached = asyncio.Event()

    async def fails_when_cancelled(*_: Any) -> None:
        attached.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise engine_link._Ended from None

    async def body() -> None:
        monkeypatch.setattr(EngineLink, "_attach", fails_when_cancelled)
        async with running() as one:
            task = asyncio.create_task(EngineLink(one.address, TRUST, "t").run(lambda: None))
            await attached.wait()
            task.cancel()
            await asyncio.wait((task,), timeout=5)
            assert task.done()

    run(body)


def test_closing_ends_every_open_request() -> None:
    async def body() -> None:
        gate = asyncio.Event()
        async with running(gate=gate, gate_at=5) as one, engines_at(Addresses(one.address)) as engines:
            answer = asyncio.create_task(collect(engines))
            await until(lambda: bool(one.engine.submitted))
            await asyncio.sleep(0.05)
            await asyncio.wait_for(engines.close(), 5)
            *_, last = await asyncio.wait_for(answer, 5)
            assert isinstance(last, Failed)
            assert last.code == "engine_dead"

    run(body)


def test_what_another_version_says_is_refused_until_the_engine_is_of_this_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strange(payload: bytes) -> Any:
        raise msgspec.ValidationError("Object missing required field `tokenizer`")

    async def body() -> None:
        async with running() as one:
            with monkeypatch.context() as patch:
                patch.setattr("router.engine_link.decode_event", strange)
                async with engines_at(Addresses(one.address), wait=False) as engines:
                    await until(lambda: "run one version" in caplog.text)
                    assert not engines.ready
                    patch.undo()
                    await until(lambda: engines.ready)

    run(body)


def test_a_request_that_reaches_a_draining_engine_goes_elsewhere() -> None:
    async def body() -> None:
        async with running() as one, running() as two:
            source = Addresses(one.address)
            async with engines_at(source) as engines:
                one.service._draining = True  # its health has not been heard yet
                answer = asyncio.create_task(collect(engines))
                await until(lambda: not engines.ready)
                source.set(one.address, two.address)
                assert token_ids(await answer) == alone()
                assert (len(one.engine.submitted), len(two.engine.submitted)) == (0, 1)

    run(body)


def test_who_reads_slowly_does_not_turn_an_engine_away_that_has_come_back() -> None:
    async def body() -> None:
        gate = asyncio.Event()
        async with running(gate=gate, gate_at=5) as one, engines_at(Addresses(one.address)) as engines:
            slow = engines.submit(Submit("slow", PROMPT, LONG))
            assert isinstance(await anext(slow), Token)
            (link,) = engines._all()
            old = link.session
            one.service._attached.copy().pop()._ended = True  # the engine ends the attachment
            one.service._attached.copy().pop()._news.set()
            await until(lambda: link.ready and link.session not in (None, old))
            gate.set()
            rest = [event async for event in slow]
            assert all(isinstance(event, Token) for event in rest)
            assert engines.ready

    run(body)


def test_a_prompt_that_fits_no_message_is_refused_and_disturbs_nobody() -> None:
    async def body() -> None:
        async with running() as one, engines_at(Addresses(one.address)) as engines:
            (failed,) = [event async for event in engines.submit(Submit("r", (7,) * 900_000, LONG))]
            assert isinstance(failed, Failed)
            assert failed.code == "context_length_exceeded"
            assert token_ids(await collect(engines)) == alone()

    run(body)


def test_a_client_that_leaves_aborts_its_request_in_the_engine() -> None:
    async def body() -> None:
        gate = asyncio.Event()
        async with running(gate=gate, gate_at=5) as one, engines_at(Addresses(one.address)) as engines:
            answer = asyncio.create_task(collect(engines))
            await until(lambda: bool(one.engine.submitted))
            answer.cancel()
            await until(lambda: len(one.engine.aborted) == 1)

    run(body)


def test_every_question_is_answered_while_tokens_flow() -> None:
    async def body() -> None:
        async with running(delay=0.002) as one, engines_at(Addresses(one.address)) as engines:
            long = SamplingParams(max_tokens=400, ignore_eos=True)
            answers = [asyncio.create_task(collect(engines, f"r{number}", long)) for number in range(4)]
            for _ in range(50):
                assert (await engines.stats()).num_requests_running <= 4
            assert not any(answer.done() for answer in answers)
            for answer in answers:
                answer.cancel()

    run(body)


def test_two_apis_may_name_their_requests_alike() -> None:
    async def body() -> None:
        async with (
            running(delay=0.001) as one,
            engines_at(Addresses(one.address)) as first,
            engines_at(Addresses(one.address)) as second,
        ):
            answers = await asyncio.gather(collect(first), collect(second))
            assert [token_ids(answer) for answer in answers] == [alone(), alone()]
            assert len({submit.request_id for submit in one.engine.submitted}) == 2

    run(body)


@pytest.mark.parametrize(("first", "counts"), [(0, (10, 0)), (3, (0, 10))], ids=["waiting", "running"])
def test_requests_are_spread_over_the_engines_and_counted(first: int, counts: tuple[int, int]) -> None:
    async def body() -> None:
        gate = asyncio.Event()
        async with (
            running(gate=gate, gate_at=first) as one,
            running(gate=gate, gate_at=first) as two,
            engines_at(Addresses(one.address, two.address)) as engines,
        ):
            await until(lambda: len(ready(engines)) == 2)
            answers = [asyncio.create_task(collect(engines, f"r{number}")) for number in range(10)]
            await until(lambda: len(one.engine.submitted) + len(two.engine.submitted) == 10)
            assert len(one.engine.submitted) == 5
            await until(lambda: (len(engines._open), sum(engines._open.values())) == (10, counts[1]))
            stats = await engines.stats()
            assert (stats.num_requests_waiting, stats.num_requests_running) == counts
            gate.set()
            await asyncio.gather(*answers)
            stats = await engines.stats()
            assert (stats.num_requests_waiting, stats.num_requests_running) == (0, 0)

    run(body)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"version": "9.9"}, "of version 9.9"),
        ({"tokenizer": "another"}, "another tokenizer"),
        ({"trust": Trust("other secret")}, "deployment token is missing or wrong"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_and_the_reason_is_logged(
    other: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async with running(**other) as one:
            source = Addresses(one.address)
            async with engines_at(source, wait=False) as engines:
                with caplog.at_level(logging.WARNING):
                    await until(lambda: says in caplog.text)
                assert not engines.ready
                assert one.address in caplog.text
                with pytest.raises(EngineFailed):
                    _ = engines.model
                with pytest.raises(EngineFailed):
                    await engines.stats()

    run(body)


def test_the_pool_is_where_the_engine_says() -> None:
    async def body() -> None:
        async with running(controller="10.0.0.1:50052") as one, engines_at(Addresses(one.address)) as engines:
            address = engines.pool_address()
            assert address is not None
            assert (address.controller, address.token) == ("10.0.0.1:50052", "secret")
        async with running() as one, engines_at(Addresses(one.address)) as engines:
            with pytest.raises(InvalidRequest, match="no pool"):
                engines.pool_address()

    run(body)


def test_what_an_engine_says_late_is_not_taken_for_the_next_answer() -> None:
    async def body() -> None:
        async with running() as one, engines_at(Addresses(one.address)) as engines:
            one.engine.hung = True
            with pytest.raises(EngineFailed):
                await engines.stats()
            one.engine.hung = False
            one.engine.expert_cache = ExpertCacheStats(queries=7)
            await asyncio.sleep(0.3)  # the late answer, of now, comes
            one.engine.expert_cache = ExpertCacheStats(queries=8)
            assert (await engines.stats()).expert_cache == ExpertCacheStats(queries=8)

    run(body)


COUNTS = st.integers(0, 100)
LINKS = st.builds(
    LinkStats,
    worker=st.sampled_from(["worker-0", "worker-1", "worker-2"]),
    transport=st.just("grpc"),
    state=st.sampled_from(["ready", "suspect", "down"]),
    dispatches=COUNTS,
    rows=COUNTS,
    bytes_sent=COUNTS,
)
POOLS = st.builds(
    PoolStats,
    epoch=COUNTS,
    experts_uncovered=COUNTS,
    resends=COUNTS,
    links=st.lists(LINKS, max_size=3, unique_by=lambda link: link.worker).map(tuple),
)
STATS = st.builds(
    Stats,
    kv_blocks_total=COUNTS,
    steps=COUNTS,
    expert_tokens=st.lists(st.lists(COUNTS, max_size=3).map(tuple), max_size=3).map(tuple),
    pool=st.none() | POOLS,
)


@given(st.lists(STATS, min_size=1, max_size=4))
def test_merged_stats_lose_and_invent_nothing(all_stats: list[Stats]) -> None:
    whole = merged(all_stats)
    assert whole.kv_blocks_total == sum(stats.kv_blocks_total for stats in all_stats)
    assert whole.steps == sum(stats.steps for stats in all_stats)
    assert sum(map(sum, whole.expert_tokens)) == sum(sum(map(sum, stats.expert_tokens)) for stats in all_stats)
    pools = [stats.pool for stats in all_stats if stats.pool is not None]
    if not pools:
        assert whole.pool is None
        return
    assert whole.pool is not None
    assert whole.pool.epoch == max(pool.epoch for pool in pools)
    assert whole.pool.experts_uncovered == max(pool.experts_uncovered for pool in pools)
    links = [link for pool in pools for link in pool.links]
    assert sum(link.rows for link in whole.pool.links) == sum(link.rows for link in links)
    workers = [link.worker for link in whole.pool.links]
    assert sorted(workers) == sorted({link.worker for link in links})
    for link in whole.pool.links:
        assert (link.state == "down") == any(seen.state == "down" for seen in links if seen.worker == link.worker)
