"""Bad input is answered with a 4xx in OpenAI's shape that names the field, and leaves the server as it was."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI

from tests.unit.fake_engine import VOCAB_SIZE, FakeEngine, client, events_of, fake_app

pytestmark = pytest.mark.anyio
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
JSON = {"content-type": "application/json"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@cache
def shared_app() -> FastAPI:
    """One server for all bad requests: none of them may leave a trace."""
    return fake_app()


async def refusal(path: str, body: Any, *, headers: dict[str, str] | None = None, **settings: Any) -> tuple[int, Any]:
    """Status and error object of a request that must be refused, after proving that the next request succeeds."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with client(fake_app(**settings) if settings else shared_app()) as http:
        response = await http.post(path, content=content, headers=headers or JSON)
        canary = await http.post(TEXT, json={"prompt": "a"})
    assert canary.status_code == 200
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return response.status_code, error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\x07",
        b"\xff\xfe",
        b'{"prompt": "\xe9"}',
        b'{"prompt": "\\ud83d"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "user": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
    ],
    ids=range(13),
)
async def test_malformed_bodies(body: bytes):
    status, error = await refusal(TEXT, body)
    assert (status, error["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", "Hello"),
        ("messages", [{"role": "king", "content": "x"}]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": None}]),
        ("messages", [{"role": "user", "content": []}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 1.0),
        ("min_p", -1),
        ("seed", 2**63),
        ("seed", 1.5),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("max_tokens", 0),
        ("max_tokens", 2**63),
        ("max_tokens", "5"),
        ("max_completion_tokens", -1),
        ("n", 0),
        ("n", 9),
        ("n", 2**70),
        ("stream", 1),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 5),
        ("stop", "x" * 65),
        ("stop_token_ids", [VOCAB_SIZE]),
        ("stop_token_ids", [-1]),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {str(VOCAB_SIZE): 1}),
        ("logit_bias", {str(token): 1 for token in range(301)}),
        ("logprobs", 1),
        ("top_logprobs", 21),
        ("top_logprobs", 1),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["audio"]),
        ("audio", {"voice": "x"}),
        ("temprature", 1),
        ("chat_template_kwargs", {"messages": []}),
    ],
)
async def test_a_bad_field_is_named(field: str, value: Any):
    status, error = await refusal(CHAT, HELLO | {field: value})
    assert status == 400
    assert error["param"] == field
    assert field in error["message"]


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], ["a", 1], [VOCAB_SIZE], [-1], [1.0], [[1], [VOCAB_SIZE]], ["a"] * 65, None, {"a": 1}]
)
async def test_bad_prompts(prompt: Any):
    status, error = await refusal(TEXT, {"prompt": prompt})
    assert (status, error["param"]) == (400, "prompt")


@pytest.mark.parametrize(
    "options", [{"n": 2, "temperature": 0}, {"max_tokens": 1, "max_completion_tokens": 2}, {"top_logprobs": 0}]
)
async def test_options_that_contradict_each_other(options: dict[str, Any]):
    assert (await refusal(CHAT, HELLO | options))[0] == 400


@pytest.mark.parametrize("body", [{"prompt": "a" * 256}, {"prompt": "a", "max_tokens": 256}, {"prompt": "a" * 100_000}])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_exceeds_the_context(body: dict[str, Any], stream: bool):
    status, error = await refusal(TEXT, body | {"stream": stream})
    assert (status, error["code"]) == (400, "context_length_exceeded")


async def test_what_exceeds_the_kv_cache_exceeds_the_context():
    engine = FakeEngine(kv_capacity_tokens=20)
    status, error = await refusal(TEXT, {"prompt": "a" * 10, "max_tokens": 11}, engine=engine)
    assert (status, error["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
async def test_an_unknown_model(path: str):
    body = {CHAT: HELLO, "/detokenize": {"tokens": [1]}}.get(path, {"prompt": "a"})
    status, error = await refusal(path, body | {"model": "gpt-99"})
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


async def test_routine_fields_of_openai_clients_are_ignored():
    routine = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "tools": None, "seed": None}
    neutral = {"response_format": {"type": "text"}, "modalities": ["text"], "tool_choice": "none", "tools": []}
    async with client(fake_app()) as http:
        response = await http.post(CHAT, json=HELLO | routine | neutral)
    assert response.status_code == 200


async def test_many_errors_make_a_short_answer():
    message = {"role": "x" * 500, "content": 1, "name": 2, "tool_call_id": 3}
    many = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "seed", "n", "stream", "ignore_eos"), "x")
    _, error = await refusal(CHAT, many | {"messages": [message] * 1000})
    assert len(error["message"]) < 10 * 202
    assert error["message"].count(";") < 10


async def test_an_unknown_name_is_not_echoed_in_full():
    _, error = await refusal(TEXT, {"prompt": "a", "x" * 10_000: 1})
    assert len(error["message"]) < 202


async def test_a_body_over_the_limit_is_413():
    status, error = await refusal(TEXT, {"prompt": "a" * 2000}, max_body_bytes=1000)
    assert (status, error["code"]) == (413, "body_too_large")


async def test_a_chunked_body_over_the_limit_is_413():
    async def chunks():
        for _ in range(100):
            yield b" " * 100

    async with client(fake_app(max_body_bytes=1000)) as http:
        response = await http.post(TEXT, content=chunks(), headers=JSON)
    assert response.status_code == 413


async def test_a_body_that_never_ends_is_408():
    async def chunks():
        yield b"{"
        await anyio.sleep(5)

    async with client(fake_app(body_timeout=0.05)) as http:
        response = await http.post(TEXT, content=chunks(), headers=JSON)
    assert response.status_code == 408


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_a_body_that_does_not_say_it_is_json_is_415(content_type: str):
    status, _ = await refusal(TEXT, {"prompt": "a"}, headers={"content-type": content_type})
    assert status == 415


async def test_unknown_paths_and_wrong_methods():
    async with client(fake_app()) as http:
        nowhere = await http.get("/v1/nowhere")
        wrong = await http.get(CHAT)
    assert (nowhere.status_code, nowhere.json()["error"]["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["type"] == "invalid_request_error"


async def test_a_model_without_a_template_serves_completions_only():
    status, error = await refusal(CHAT, HELLO, template=False)
    assert status == 400
    assert "completions only" in error["message"]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("engine_dead", 503),
        ("context_length_exceeded", 400),
        ("invalid_request", 400),
        ("nonfinite", 500),
        ("internal", 500),
        ("surprise", 500),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_token_is_an_http_error(code: str, status: int, stream: bool):
    engine = FakeEngine(fail=0, fail_code=code)
    async with client(fake_app(engine)) as http:
        response = await http.post(CHAT, json=HELLO | {"stream": stream})
    assert response.status_code == status
    assert ("retry-after" in response.headers) == (status == 503)
    assert (response.headers.get("x-should-retry") == "false") == (status == 500)
    assert response.json()["error"]["code"] == ("internal" if code == "surprise" else code)
    assert "secret" not in response.text


async def test_a_failure_in_a_stream_is_its_last_event():
    async with client(fake_app(FakeEngine(fail=3, fail_code="engine_dead"))) as http:
        response = await http.post(CHAT, json=HELLO | {"stream": True})
    *chunks, last = events_of(response.text)
    assert chunks
    assert set(last) == {"error"}
    assert set(last["error"]) == {"message", "type", "code"}
    assert last["error"]["code"] == "engine_dead"
    assert not any(choice["finish_reason"] for chunk in chunks for choice in chunk["choices"])


async def test_one_failed_choice_fails_and_frees_the_others():
    engine = FakeEngine(delay=0.001)
    engine.script = lambda submit: [5] * (2 if submit.request_id.endswith("-1") else 50)  # -1 ends without a reason
    async with client(fake_app(engine)) as http:
        response = await http.post(CHAT, json=HELLO | {"n": 3})
    assert response.status_code == 500
    assert len(engine.aborted) == 3


async def test_a_bug_is_a_plain_500(monkeypatch: pytest.MonkeyPatch):
    engine = FakeEngine()
    monkeypatch.setattr(engine, "script", lambda _: 1 // 0)
    transport = httpx.ASGITransport(fake_app(engine), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        response = await http.post(CHAT, json=HELLO)
    assert (response.status_code, response.headers["x-should-retry"]) == (500, "false")
    assert "division" not in response.text
    assert response.json()["error"]["code"] == "internal"


async def test_a_bug_in_a_stream_is_its_last_event():
    def script(_: Any) -> Any:
        yield 5
        raise ZeroDivisionError

    async with client(fake_app(FakeEngine(script=script))) as http:
        response = await http.post(CHAT, json=HELLO | {"stream": True})
    assert events_of(response.text)[-1]["error"]["code"] == "internal"
