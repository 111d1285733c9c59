"""The gRPC API over a real connection: the answers of HTTP, its refusals, its keys, its readiness and its endings."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from fastapi import FastAPI
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest
from grpc_health.v1.health_pb2_grpc import HealthStub
from hypothesis import given, settings
from hypothesis import strategies as st

from barista.errors import ConfigError, RequestError
from barista.v1.router_pb2 import Chat, ChatMessage, GenerateReply, GenerateRequest, TemplateOptions, TokenIds
from barista.v1.router_pb2_grpc import RouterStub
from router import grpc_api
from router.announce import Announcement
from router.api.errors import engine_failed
from router.api.schemas import ChatCompletionRequest, CompletionRequest
from router.grpc_api import GrpcApi, body_of, status_of
from router.messages import PoolStats
from tests.unit.fake_engine import EOS, FIRST_BYTE, FakeEngine, client, fake_app, tokens_of
from tests.unit.test_cli_server import Running, running

pytestmark = pytest.mark.anyio
KEYS = tuple(hashlib.sha256(key).digest() for key in (b"one", b"two"))
ADMIN = (hashlib.sha256(b"admin").digest(),)
NAMES = ("", "barista.v1.Router")
Code = grpc.StatusCode


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Served:
    """An application behind a real server, and a client of it."""

    app: FastAPI
    engine: FakeEngine
    api: GrpcApi
    router: RouterStub
    health: HealthStub

    async def replies(self, request: GenerateRequest, key: str = "") -> list[GenerateReply]:
        metadata = (("authorization", f"Bearer {key}"),) if key else ()
        return [reply async for reply in self.router.Generate(request, metadata=metadata)]

    async def refusal(self, request: GenerateRequest, key: str = "") -> tuple[grpc.StatusCode, str, dict[str, str]]:
        """Status, message and trailing metadata of a call that must fail."""
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await self.replies(request, key)
        return failed.value.code(), failed.value.details(), dict(failed.value.trailing_metadata())

    async def http(self, path: str, body: dict[str, Any], key: str = "") -> Any:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with client(self.app, headers=headers) as http:
            return await http.post(path, json=body)

    async def serving(self, name: str = "") -> bool:
        reply = await self.health.Check(HealthCheckRequest(service=name))
        return reply.status == HealthCheckResponse.SERVING


@contextlib.asynccontextmanager
async def serving(engine: FakeEngine | None = None, **options: Any) -> AsyncIterator[Served]:
    engine = engine or FakeEngine()
    app = fake_app(engine, **options)
    api = GrpcApi(app.state.service, 0)
    await api.start("127.0.0.1")
    try:
        async with grpc.aio.insecure_channel(api.address) as channel:
            yield Served(app, engine, api, RouterStub(channel), HealthStub(channel))
    finally:
        await api.stop(0)
        # What grpc.aio still has to say to this event loop must not reach the next one, where it would be an error.
        gc.collect()
        await asyncio.sleep(0.02)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def chat(text: str = "Hello", **fields: Any) -> GenerateRequest:
    return GenerateRequest(chat=Chat(messages=[ChatMessage(role="user", content=text)]), **fields)


def text_of(replies: list[GenerateReply]) -> str:
    return "".join(reply.text for reply in replies)


# ---- answers

OPTIONS = st.fixed_dictionaries(
    {"seed": st.integers(-(2**63), 2**63 - 1)},
    optional={
        "model": st.just("house-blend"),
        "max_tokens": st.integers(1, 30),
        "temperature": st.sampled_from([0.0, 0.1, 1.0, 2.0]),
        "top_p": st.sampled_from([0.1, 1.0]),
        "top_k": st.integers(-1, 50),
        "min_p": st.sampled_from([0.0, 0.3]),
        "presence_penalty": st.sampled_from([-2.0, 0.0, 1.3]),
        "frequency_penalty": st.sampled_from([-2.0, 0.0, 1.3]),
        "repetition_penalty": st.sampled_from([0.7, 1.0]),
        "logit_bias": st.dictionaries(st.integers(0, 99), st.sampled_from([-100.0, 0.1])),
        "stop": st.lists(st.sampled_from(["a", "STOP", "e cup", "☕"]), max_size=4),
        "stop_token_ids": st.lists(st.integers(0, 99), max_size=4),
        "ignore_eos": st.booleans(),
    },
)
INPUTS = st.one_of(
    st.text(min_size=1, max_size=9).map(lambda text: ({"prompt": text}, {"prompt": text})),
    st.lists(st.integers(0, 99), min_size=1, max_size=9).map(
        lambda ids: ({"token_ids": {"ids": ids}}, {"prompt": ids})
    ),
    st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text()}),
        min_size=1,
        max_size=3,
    ).map(lambda messages: ({"chat": {"messages": messages}}, {"messages": messages})),
)


@pytest.fixture(scope="module")
def standing() -> Iterator[tuple[asyncio.Runner, Served]]:
    """One server for many examples, and the event loop that it lives on."""
    with asyncio.Runner() as runner:
        server = serving()
        served = runner.run(server.__aenter__())
        yield runner, served
        runner.run(server.__aexit__(None, None, None))


@given(INPUTS, OPTIONS)
@settings(deadline=None, max_examples=25)
def test_an_answer_is_that_of_http(
    standing: tuple[asyncio.Runner, Served], inputs: tuple[dict[str, Any], dict[str, Any]], options: dict[str, Any]
) -> None:
    runner, served = standing
    typed, plain = inputs
    is_chat = "messages" in plain
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    bias = {str(token): value for token, value in options.get("logit_bias", {}).items()}

    async def ask() -> tuple[list[GenerateReply], Any]:
        replies = await served.replies(GenerateRequest(**typed, **options))
        answer = await served.http(path, plain | options | ({"logit_bias": bias} if bias else {}))
        return replies, answer.json()

    replies, answer = runner.run(ask())
    (choice,) = answer["choices"]
    assert text_of(replies) == (choice["message"]["content"] if is_chat else choice["text"])
    assert [reply.finish_reason for reply in replies] == [""] * (len(replies) - 1) + [choice["finish_reason"]]
    assert [reply.HasField("usage") for reply in replies] == [False] * (len(replies) - 1) + [True]
    usage = replies[-1].usage
    assert answer["usage"] == {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    ours, theirs = served.engine.submitted[-2:]
    assert (ours.prompt_token_ids, ours.sampling) == (theirs.prompt_token_ids, theirs.sampling)
    assert sum(len(reply.token_ids) for reply in replies) == usage.completion_tokens


async def test_a_reply_carries_its_token_also_where_there_is_no_text() -> None:
    async with serving(FakeEngine(script=lambda _: tokens_of("☕ the cup"))) as served:
        replies = await served.replies(chat(stop=["cup"]))
        assert text_of(replies) == "☕ the "
        assert [list(reply.token_ids) for reply in replies] == [[token] for token in tokens_of("☕ the cup")[:-1]]
        assert replies[0].text == ""
        assert served.engine.aborted == [served.engine.submitted[0].request_id]


async def test_an_empty_reply_still_says_why_it_ended() -> None:
    async with serving(FakeEngine(script=lambda _: [EOS])) as served:
        (reply,) = await served.replies(chat())
        assert (reply.text, list(reply.token_ids), reply.finish_reason) == ("", [EOS], "stop")


@pytest.mark.parametrize("request_", [chat(logprobs=2), GenerateRequest(prompt="a", logprobs=2)], ids=["chat", "text"])
async def test_logprobs_come_with_each_token_if_they_are_asked_for(request_: GenerateRequest) -> None:
    async with serving(FakeEngine(script=lambda _: tokens_of("ab"))) as served:
        for reply in await served.replies(request_):
            (logprobs,) = reply.logprobs
            assert logprobs.logprob == -0.5
            top = [(other.token_id, other.logprob) for other in logprobs.top_logprobs]
            assert top == [(FIRST_BYTE + 65, -0.25), (FIRST_BYTE + 66, -9999.0)]
        assert all(not reply.logprobs for reply in await served.replies(chat()))


def test_every_field_reaches_the_body_under_its_own_name() -> None:
    """What a body has and gRPC has not: several answers, and the streaming that is always there."""
    names = {field.name for field in GenerateRequest.DESCRIPTOR.fields} - {"prompt", "token_ids", "chat", "logprobs"}
    assert names == ChatCompletionRequest.model_fields.keys() & CompletionRequest.model_fields.keys() - {
        "n", "stream", "stream_options", "logprobs"
    }  # fmt: skip
    options = TemplateOptions(enable_thinking=False, thinking=True, reasoning_effort="low")
    body = body_of(
        GenerateRequest(chat=Chat(messages=[ChatMessage(role="user", content="")], chat_template_kwargs=options))
    )
    assert body.model_dump(exclude_none=True) == {
        "messages": [{"role": "user", "content": ""}],
        "chat_template_kwargs": {"enable_thinking": False, "thinking": True, "reasoning_effort": "low"},
    }
    # Absent is the default, present is what it says.
    assert body_of(GenerateRequest(prompt="a")).model_dump(exclude_none=True) == {"prompt": "a"}
    zeros = body_of(GenerateRequest(prompt="a", temperature=0, seed=0, ignore_eos=False))
    assert zeros.model_dump(exclude_none=True) == {"prompt": "a", "temperature": 0.0, "seed": 0, "ignore_eos": False}


# ---- refusals


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": float("inf")}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop_token_ids": [9999]}, "stop_token_ids"),
        ({"logit_bias": {9999: 1.0}}, "logit_bias"),
        ({"max_tokens": 1000}, "context length"),
    ],
)
async def test_a_value_out_of_bounds_is_refused_as_by_http(fields: dict[str, Any], named: str) -> None:
    async with serving() as served:
        code, message, trailing = await served.refusal(GenerateRequest(prompt="a", **fields))
        assert code == Code.INVALID_ARGUMENT
        assert named in message
        assert trailing["barista-code"] in ("invalid_request_error", "context_length_exceeded")
        assert "retry-after" not in trailing
        assert served.engine.submitted == []


async def test_the_message_and_the_code_are_https() -> None:
    body = {"prompt": "a", "temperature": 3.0, "top_k": -5}
    async with serving() as served:
        code, message, trailing = await served.refusal(GenerateRequest(**body))
        answer = await served.http("/v1/completions", body)
        error = answer.json()["error"]
        assert (code, message) == (Code.INVALID_ARGUMENT, error["message"])
        assert trailing["barista-code"] == error["type"]


@pytest.mark.parametrize(
    "request_",
    [
        GenerateRequest(),
        GenerateRequest(token_ids=TokenIds()),
        GenerateRequest(token_ids=TokenIds(ids=[9999])),
        GenerateRequest(prompt=""),
        GenerateRequest(chat=Chat()),
        GenerateRequest(chat=Chat(messages=[ChatMessage(content="no role")])),
        GenerateRequest(chat=Chat(messages=[ChatMessage(role="user")])),
        GenerateRequest(chat=Chat(messages=[ChatMessage(role="barista", content="a")])),
        chat(logprobs=21),
        # Fields that only a newer version knows: 31 of the request, 15 of a message.
        GenerateRequest.FromString(GenerateRequest(prompt="a").SerializeToString() + b"\xf8\x01\x01"),
        GenerateRequest(chat=Chat(messages=[ChatMessage.FromString(b"\x0a\x04user\x12\x01a\x78\x01")])),
    ],
    ids=str,
)
async def test_an_input_that_cannot_be_answered_is_refused(request_: GenerateRequest) -> None:
    async with serving() as served:
        code, message, _ = await served.refusal(request_)
        assert (code, bool(message)) == (Code.INVALID_ARGUMENT, True)
        assert served.engine.submitted == []


async def test_another_model_is_not_found() -> None:
    async with serving() as served:
        code, message, trailing = await served.refusal(chat(model="gpt-99"))
        assert (code, trailing["barista-code"]) == (Code.NOT_FOUND, "model_not_found")
        assert "gpt-99" in message


async def test_a_chat_without_a_template_is_refused_and_a_prompt_is_not() -> None:
    async with serving(template=False) as served:
        assert (await served.refusal(chat()))[0] == Code.INVALID_ARGUMENT
        assert await served.replies(GenerateRequest(prompt="a"))


@pytest.mark.parametrize(
    ("bounds", "status", "barista_code"),
    [
        ({"max_open_per_key": 1}, Code.RESOURCE_EXHAUSTED, "rate_limit"),
        ({"max_waiting_requests": 1}, Code.UNAVAILABLE, "overloaded"),
    ],
)
async def test_a_full_server_says_when_to_come_back(
    bounds: dict[str, int], status: grpc.StatusCode, barista_code: str
) -> None:
    engine = FakeEngine(gate=asyncio.Event())
    async with serving(engine, api_keys=KEYS, **bounds) as served:
        waiting = asyncio.create_task(served.http("/v1/completions", {"prompt": "a"}, key="one"))
        await until(lambda: bool(engine.submitted))
        code, _, trailing = await served.refusal(chat(), key="one")
        assert (code, trailing["barista-code"]) == (status, barista_code)
        assert int(trailing["retry-after"]) > 0
        engine.gate.set()
        assert (await waiting).status_code == 200


async def test_a_request_that_is_too_large_is_refused() -> None:
    async with serving(max_body_bytes=1000) as served:
        assert (await served.refusal(GenerateRequest(prompt="a" * 2000)))[0] == Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("fail_code", "status"),
    [("internal", Code.INTERNAL), ("expert_unavailable", Code.UNAVAILABLE), ("nonfinite", Code.INTERNAL)],
)
async def test_an_engine_that_fails_ends_the_call_after_what_it_has_said(
    fail_code: str, status: grpc.StatusCode
) -> None:
    async with serving(FakeEngine(fail=3, fail_code=fail_code)) as served:
        call = served.router.Generate(chat())
        seen = []
        with pytest.raises(grpc.aio.AioRpcError) as failed:  # noqa: PT012  # how far it comes is looked at
            async for reply in call:
                seen.append(reply)
        assert len(seen) == 3
        assert (failed.value.code(), failed.value.details()) == (status, str(engine_failed(fail_code)))
        assert dict(failed.value.trailing_metadata())["barista-code"] == fail_code
        metrics = served.app.state.service.metrics.exposition(None, None).decode()
        assert f'request_failure_total{{code="{fail_code}"}} 1.0' in metrics


async def test_a_bug_is_an_internal_error_that_tells_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(grpc_api, "_reply", lambda *_: 1 / 0)
    async with serving() as served:
        code, message, trailing = await served.refusal(chat())
        assert (code, message) == (Code.INTERNAL, "The server failed to finish this request.")
        assert trailing["barista-code"] == "internal"
    assert "ZeroDivisionError" in caplog.text


def test_every_status_of_http_has_one_of_grpc() -> None:
    statuses = {status: status_of(RequestError("x", status=status)).name for status in range(400, 600)}
    assert {status: statuses[status] for status in (400, 401, 403, 404, 413, 429, 500, 502, 503)} == {
        400: "INVALID_ARGUMENT",
        401: "UNAUTHENTICATED",
        403: "PERMISSION_DENIED",
        404: "NOT_FOUND",
        413: "INVALID_ARGUMENT",
        429: "RESOURCE_EXHAUSTED",
        500: "INTERNAL",
        502: "INTERNAL",
        503: "UNAVAILABLE",
    }


# ---- keys


async def test_without_a_valid_key_nothing_is_generated() -> None:
    async with serving(api_keys=KEYS, admin_keys=ADMIN) as served:
        for authorization in (None, "Bearer three", "Bearer ", "Basic one", "one", "bearer"):
            metadata = () if authorization is None else (("authorization", authorization),)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await served.router.Generate(GenerateRequest(), metadata=metadata).read()
            assert refused.value.code() == Code.UNAUTHENTICATED
            assert dict(refused.value.trailing_metadata())["barista-code"] == "invalid_api_key"
        assert served.engine.submitted == []


async def test_a_key_opens_and_has_the_cache_salt_that_it_has_over_http() -> None:
    async with serving(api_keys=KEYS, admin_keys=ADMIN) as served:
        for key in ("one", "two", "admin"):
            assert await served.replies(chat(), key)
            await served.http("/v1/completions", {"prompt": "a"}, key)
        salts = [submit.salt for submit in served.engine.submitted]
        assert salts[::2] == salts[1::2]
        assert len(set(salts)) == 3


# ---- health


async def test_health_follows_readiness_and_needs_no_key() -> None:
    engine = FakeEngine(ready=False)
    async with serving(engine, api_keys=KEYS) as served:

        async def agree(wanted: bool) -> None:
            async with client(served.app) as http:
                assert ((await http.get("/ready")).status_code == 200) == wanted
            assert [await served.serving(name) for name in NAMES] == [wanted, wanted]
            listed = (await served.health.List(HealthListRequest())).statuses
            assert {name: listed[name].status == HealthCheckResponse.SERVING for name in listed} == dict.fromkeys(
                NAMES, wanted
            )

        await agree(False)
        engine.ready = True
        await agree(True)
        engine.pool = PoolStats(experts_uncovered=2)
        await agree(False)
        engine.pool, engine.hung = None, True
        await agree(False)
        engine.hung = False
        await agree(True)
        served.app.state.drain()
        await agree(False)


async def test_a_watcher_is_told_of_each_change_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_api, "HEALTH_SECONDS", 0.02)
    async with serving() as served:
        watch = served.health.Watch(HealthCheckRequest(service="barista.v1.Router"))
        assert (await watch.read()).status == HealthCheckResponse.SERVING
        await asyncio.sleep(0.1)
        served.engine.ready = False
        assert (await watch.read()).status == HealthCheckResponse.NOT_SERVING
        async with asyncio.timeout(2):  # an open watch does not hold up the end
            await served.api.stop(60)


async def test_another_service_is_unknown() -> None:
    async with serving() as served:
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await served.serving("barista.v1.Engine")
        assert unknown.value.code() == Code.NOT_FOUND
        watch = served.health.Watch(HealthCheckRequest(service="barista.v1.Engine"))
        assert (await watch.read()).status == HealthCheckResponse.SERVICE_UNKNOWN


# ---- endings


@pytest.mark.parametrize("tokens", [0, 1, 3], ids=lambda tokens: f"after {tokens}")
@pytest.mark.parametrize("leave", ["cancel", "close", "deadline"])
async def test_a_client_that_leaves_aborts_its_sequence(leave: str, tokens: int) -> None:
    engine = FakeEngine(script=lambda _: [70] * 200, gate=asyncio.Event(), gate_at=tokens)
    async with serving(engine) as served:
        async with grpc.aio.insecure_channel(served.api.address) as channel:
            timeout = 0.3 if leave == "deadline" else None
            call = RouterStub(channel).Generate(chat(max_tokens=200), timeout=timeout)
            for _ in range(tokens):
                assert (await call.read()).text
            await until(lambda: bool(engine.submitted))
            if leave == "cancel":
                call.cancel()
            elif leave == "close":
                await channel.close()
            await until(lambda: engine.aborted == [engine.submitted[0].request_id])
        await asyncio.wait_for(served.app.state.wait_idle(), 5)
        metrics = served.app.state.service.metrics.exposition(None, None).decode()
        assert 'request_failure_total{code="client_disconnected"} 1.0' in metrics


async def test_a_client_that_leaves_does_not_disturb_the_others() -> None:
    engine = FakeEngine(script=lambda _: [70] * 30 + [EOS], delay=0.005)
    async with serving(engine) as served:
        stays = asyncio.create_task(served.replies(chat()))
        leaves = served.router.Generate(chat("Bye"))
        await leaves.read()
        leaves.cancel()
        assert len(await stays) == 31
        assert len(engine.aborted) == 1


async def test_draining_refuses_new_calls_and_lets_open_ones_finish() -> None:
    engine = FakeEngine(script=lambda _: tokens_of("the cup"), gate=asyncio.Event(), gate_at=1)
    async with serving(engine) as served:
        replies = aiter(served.router.Generate(chat()))
        first = await anext(replies)
        served.app.state.drain()
        code, _, trailing = await served.refusal(chat())
        assert (code, trailing["barista-code"], trailing["retry-after"]) == (Code.UNAVAILABLE, "draining", "5")
        engine.gate.set()
        rest = [reply async for reply in replies]
        assert text_of([first, *rest]) == "the cup"
        await asyncio.wait_for(served.app.state.wait_idle(), 5)


async def test_a_port_that_is_taken_is_an_error_with_a_remedy() -> None:
    async with serving() as served:
        taken = int(served.api.address.rpartition(":")[2])
        with pytest.raises(ConfigError, match="--grpc-port"):
            await GrpcApi(served.app.state.service, taken).start("127.0.0.1")


async def test_a_server_beyond_loopback_is_announced_as_seen_from_here() -> None:
    api = GrpcApi(fake_app(api_keys=KEYS).state.service, 0)
    await api.start("0.0.0.0")
    assert api.address.startswith("127.0.0.1:")
    await api.stop(0)


def test_its_address_is_told_to_people_and_programs() -> None:
    announcement = Announcement(
        url="http://127.0.0.1:8000", model_id="m", path=Path("/m"), has_chat=True, needs_key=False, engines="e:1"
    )
    model = FakeEngine().model
    assert "\n  gRPC      127.0.0.1:50053\n" in announcement.as_text(model, "127.0.0.1:50053")
    assert "gRPC" not in announcement.as_text(model)
    assert json.loads(announcement.as_json(model, "127.0.0.1:50053"))["grpc"] == "127.0.0.1:50053"
    assert "grpc" not in announcement.as_json(model)


# ---- a whole server


@contextlib.contextmanager
def calling(server: Running) -> Iterator[RouterStub]:
    """A client of a server that has just got ready."""
    server.wait_ready()
    assert server.process.stdout is not None
    with grpc.insecure_channel(server.process.stdout.readline().strip()) as channel:
        yield RouterStub(channel)


def test_sigterm_drains_calls_as_it_drains_streams() -> None:
    with running("0.05", "10") as server, calling(server) as stub:
        call = stub.Generate(chat(max_tokens=20))
        replies = [next(call)]
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as refused:  # noqa: PT012  # the signal has to arrive
            while True:
                list(stub.Generate(chat(max_tokens=1)))
        assert refused.value.code() == Code.UNAVAILABLE
        assert dict(refused.value.trailing_metadata())["barista-code"] == "draining"
        replies += call
        assert (len(replies), replies[-1].finish_reason) == (20, "length")
        status, errors = server.end()
        assert status == 0
        assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "number"),
    [(("0.05", "10"), signal.SIGINT), pytest.param(("0.2", "0.3"), signal.SIGTERM, marks=pytest.mark.long)],
)
def test_what_is_not_finished_in_time_ends_with_an_error_status(
    arguments: tuple[str, str], number: signal.Signals
) -> None:
    with running(*arguments) as server, calling(server) as stub:
        call = stub.Generate(chat(max_tokens=90))
        next(call)
        server.process.send_signal(number)
        with pytest.raises(grpc.RpcError) as ended:
            list(call)
        assert ended.value.code() == Code.UNAVAILABLE
        assert dict(ended.value.trailing_metadata())["barista-code"] == "engine_dead"
        status, errors = server.end()
        assert status == 0
        assert "Traceback" not in errors
