"""Over a real socket: the official client, clients that leave, and what the OpenAPI document promises."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.unit.fake_engine import FakeEngine, eventually, fake_app, served, tokens_of

REPLY = "Hello, the cup ☕"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def sdk() -> Iterator[openai.OpenAI]:
    engine = FakeEngine(script=lambda _: tokens_of(REPLY))
    with served(fake_app(engine)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as sdk:
        yield sdk


def test_sdk_chat(sdk: openai.OpenAI):
    answer = sdk.chat.completions.create(model="house-blend", messages=HELLO, logprobs=True, top_logprobs=1)
    assert answer.choices[0].message.content == REPLY
    assert answer.usage.completion_tokens == len(answer.choices[0].logprobs.content)


def test_sdk_stream(sdk: openai.OpenAI):
    chunks = list(
        sdk.chat.completions.create(
            model="house-blend", messages=HELLO, n=2, stream=True, stream_options={"include_usage": True}
        )
    )
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.delta.content or "" for choice in choices) == REPLY
        assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    assert chunks[-1].usage.completion_tokens == 2 * len(tokens_of(REPLY))


def test_sdk_completions(sdk: openai.OpenAI):
    answer = sdk.completions.create(model="house-blend", prompt=["a", "b"])
    assert [choice.text for choice in answer.choices] == [REPLY, REPLY]


def test_sdk_models(sdk: openai.OpenAI):
    assert [model.id for model in sdk.models.list()] == ["house-blend"]


def test_sdk_errors(sdk: openai.OpenAI):
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.chat.completions.create(model="gpt-99", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.chat.completions.create(model="house-blend", messages=HELLO, temperature=3)
    assert bad.value.param == "temperature"


def test_sdk_raises_when_a_stream_fails():
    with (
        served(fake_app(FakeEngine(fail=4))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as sdk,
        pytest.raises(openai.APIError) as failed,
    ):
        list(sdk.completions.create(model="house-blend", prompt="a", stream=True))
    assert failed.value.code == "internal"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_sequences(stream: bool):
    engine = FakeEngine(script=lambda _: [5] * 200, delay=0.02)
    app = fake_app(engine)
    with served(app) as url, httpx.Client(base_url=url) as http:
        body = {"prompt": "a", "n": 2, "stream": stream, "max_tokens": 200}
        if stream:
            with http.stream("POST", "/v1/completions", json=body) as reply:
                next(reply.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=body, timeout=0.2)
        assert eventually(lambda: len(engine.aborted) == 2, seconds=1)
        assert 'request_failure_total{code="client_disconnected"} 1.0' in http.get("/metrics").text
        assert eventually(lambda: http.get("/ready").status_code == 200)


def test_a_client_that_leaves_does_not_disturb_the_others():
    engine = FakeEngine(script=lambda _: [66] * 30 + [0], delay=0.01)
    with served(fake_app(engine)) as url, httpx.Client(base_url=url) as http:
        with http.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}) as stays:
            with http.stream("POST", "/v1/completions", json={"prompt": "b", "stream": True}) as leaves:
                next(leaves.iter_lines())
            text = stays.read().decode()
        assert text.endswith("data: [DONE]\n\n")
        assert eventually(lambda: len(engine.aborted) == 1)
