"""What a request is answered with: text, usage, logprobs, seeds, and the same in a stream."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from router.api.sampling import choice_seed
from tests.unit.fake_engine import (
    EOS,
    FIRST_BYTE,
    PIECES,
    FakeEngine,
    FakeTokenizer,
    client,
    events_of,
    fake_app,
    tokens_of,
)

pytestmark = pytest.mark.anyio
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
REPLY = "Hello, the cup ☕ is full"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def saying(text: str, **options: Any) -> FakeEngine:
    return FakeEngine(script=lambda _: tokens_of(text), **options)


async def post(engine: FakeEngine, path: str, body: dict[str, Any]) -> Any:
    async with client(fake_app(engine)) as http:
        response = await http.post(path, json=body)
    assert response.status_code == 200, response.text
    return events_of(response.text) if body.get("stream") else response.json()


async def test_chat_answers_with_openais_fields():
    answer = await post(saying(REPLY), CHAT, HELLO)
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": REPLY, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    num_prompt = len("user: Hello\nassistant:")
    num_drawn = len(tokens_of(REPLY))
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_drawn,
        "total_tokens": num_prompt + num_drawn,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "house-blend"
    assert answer["system_fingerprint"] == "fake-f32"


@pytest.mark.parametrize(
    "content", ["Hello", [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]], ids=["string", "parts"]
)
@pytest.mark.parametrize("role", ["user", "system", "developer"])
async def test_content_may_be_a_string_or_text_parts(content: Any, role: str):
    engine = FakeEngine()
    await post(engine, CHAT, {"messages": [{"role": role, "content": content}]})
    expected = f"{role.replace('developer', 'system')}: Hello\nassistant:"
    assert bytes(token - FIRST_BYTE for token in engine.submitted[0].prompt_token_ids).decode() == expected


async def test_an_answer_can_be_sent_back_as_it_came():
    message = (await post(saying("yes"), CHAT, HELLO))["choices"][0]["message"]
    message |= {"tool_calls": None, "audio": None, "function_call": None, "annotations": []}
    await post(saying("yes"), CHAT, {"messages": [*HELLO["messages"], message, {"role": "tool", "content": "x"}]})


@pytest.mark.parametrize("prompt", ["ab", ["ab"], [98, 99], [[98, 99]]], ids=["text", "texts", "ids", "lists of ids"])
async def test_a_prompt_may_be_text_or_token_ids(prompt: Any):
    engine = saying("x")
    answer = await post(engine, TEXT, {"prompt": prompt})
    assert engine.submitted[0].prompt_token_ids == (98, 99)
    assert answer["choices"] == [{"index": 0, "text": "x", "logprobs": None, "finish_reason": "stop"}]


async def test_choices_of_several_prompts_are_numbered_prompt_by_prompt():
    engine = FakeEngine()
    answer = await post(engine, TEXT, {"prompt": ["a", "b"], "n": 2, "seed": 5, "echo": True})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][0] for choice in answer["choices"]] == ["a", "a", "b", "b"]
    assert answer["usage"]["prompt_tokens"] == 2


async def test_the_first_choice_does_not_depend_on_n_nor_on_other_prompts():
    alone = await post(FakeEngine(), TEXT, {"prompt": "b", "seed": 5})
    among = await post(FakeEngine(), TEXT, {"prompt": ["a", "b"], "n": 3, "seed": 5})
    texts = [choice["text"] for choice in among["choices"]]
    assert texts[3] == alone["choices"][0]["text"]
    assert len(set(texts)) == 6


async def test_seeds_are_the_clients_or_random_63_bits():
    engine = FakeEngine()
    for body in ({"seed": 7, "n": 2}, {"seed": -1}, {}, {}):
        await post(engine, TEXT, {"prompt": "a"} | body)
    first, second, negative, *drawn = (submit.sampling.seed for submit in engine.submitted)
    assert (first, second, negative) == (7, choice_seed(7, 1), 2**63 - 1)
    assert drawn[0] != drawn[1]
    assert all(0 <= submit.sampling.seed < 2**63 for submit in engine.submitted)


async def test_a_completion_is_16_tokens_by_default_or_what_the_context_has_room_for():
    engine = FakeEngine(max_model_len=100)
    for length in (1, 84, 90):
        await post(engine, TEXT, {"prompt": "a" * length})
    assert [submit.sampling.max_tokens for submit in engine.submitted] == [16, 16, 10]


async def test_a_chats_max_tokens_default_to_the_rest_of_the_context():
    engine = FakeEngine(max_model_len=100)
    for body in ({}, {"max_tokens": 5}):
        await post(engine, CHAT, HELLO | body)
    rest = 100 - len("user: Hello\nassistant:")
    assert [submit.sampling.max_tokens for submit in engine.submitted] == [rest, 5]


async def test_a_full_length_answer_finishes_by_length():
    answer = await post(saying("abcdef"), CHAT, HELLO | {"max_completion_tokens": 3})
    assert answer["choices"][0]["message"]["content"] == "abc"
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_across_tokens_cuts_the_text_and_aborts_the_engine(stream: bool):
    engine = FakeEngine(script=lambda _: tokens_of("espresso")[:-1] + tokens_of("S")[:-1] + tokens_of("top the cup"))
    answer = await post(engine, TEXT, {"prompt": "a", "stop": ["never", "oStop th"], "stream": stream})
    chunks = answer[:-1] if stream else [answer]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "espress"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert engine.aborted == [engine.submitted[0].request_id]


async def test_a_stop_token_has_no_text_but_counts():
    cup = 257 + PIECES.index(" cup")
    answer = await post(saying("the cup runs"), TEXT, {"prompt": "a", "stop_token_ids": [cup]})
    assert answer["choices"][0] == {"index": 0, "text": "the", "logprobs": None, "finish_reason": "stop"}
    assert answer["usage"]["completion_tokens"] == 4


async def test_an_incomplete_character_at_the_end_is_shown_as_such():
    answer = await post(saying("a☕"), TEXT, {"prompt": "x", "max_tokens": 2})
    assert answer["choices"][0]["text"] == "a\ufffd"


async def test_special_tokens_are_not_shown():
    engine = FakeEngine(script=lambda _: [FIRST_BYTE + 97, EOS, FIRST_BYTE + 98])
    answer = await post(engine, TEXT, {"prompt": "a", "ignore_eos": True, "max_tokens": 3})
    assert answer["choices"][0]["text"] == "ab"
    assert answer["usage"]["completion_tokens"] == 3


async def test_chat_logprobs_have_one_entry_per_token():
    answer = await post(saying("☕"), CHAT, HELLO | {"logprobs": True, "top_logprobs": 2})
    entries = answer["choices"][0]["logprobs"]["content"]
    assert len(entries) == answer["usage"]["completion_tokens"]
    assert bytes(byte for entry in entries[:-1] for byte in entry["bytes"]).decode() == "☕"
    assert entries[0]["top_logprobs"] == [
        {"token": "A", "logprob": -0.25, "bytes": [65]},
        {"token": "B", "logprob": -9999.0, "bytes": [66]},
    ]


async def test_legacy_logprobs_are_parallel_lists():
    answer = await post(saying("a cup"), TEXT, {"prompt": "x", "logprobs": 1})
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["a", " cup", "<eos>"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"A": -0.25, "a": -0.5}, {"A": -0.25, " cup": -0.5}, {"A": -0.25, "<eos>": -0.5}],
        "text_offset": [0, 1, 5],
    }


@pytest.mark.parametrize("options", [{}, {"stop": "e"}, {"logprobs": True, "top_logprobs": 1}, {"max_tokens": 5}])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_chat_stream_adds_up_to_the_whole_answer(options: dict[str, Any], n: int):
    body = HELLO | options | {"n": n, "seed": 11}
    whole = await post(FakeEngine(), CHAT, body)
    *chunks, done = await post(FakeEngine(), CHAT, body | {"stream": True, "stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    usage = chunks.pop()
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert parts[0]["delta"]["role"] == "assistant"
        assert not any("role" in part["delta"] for part in parts[1:])
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        entries = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert entries == (choice["logprobs"]["content"] if choice["logprobs"] else [])


async def test_a_completion_stream_adds_up_to_the_whole_answer():
    body = {"prompt": ["a", "bc"], "n": 2, "seed": 3, "echo": True}
    whole = await post(FakeEngine(), TEXT, body)
    *chunks, done = await post(FakeEngine(), TEXT, body | {"stream": True})
    assert done == "[DONE]"
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]


async def test_long_prompts_are_tokenised_too():
    engine = FakeEngine(max_model_len=10_000, kv_capacity_tokens=10_000)
    await post(engine, CHAT, {"messages": [{"role": "user", "content": "x" * 5000}]})
    assert len(engine.submitted[0].prompt_token_ids) > 5000


async def test_tokenize_and_detokenize_are_inverse():
    async with client(fake_app()) as http:
        tokens = (await http.post("/tokenize", json={"prompt": "a ☕", "return_token_strs": True})).json()
        text = (await http.post("/detokenize", json={"tokens": tokens["tokens"]})).json()
        chat = (await http.post("/tokenize", json=HELLO)).json()
    assert text == {"prompt": "a ☕"}
    assert (tokens["count"], tokens["max_model_len"], len(tokens["token_strs"])) == (5, 256, 5)
    assert chat["count"] == len("user: Hello\nassistant:")


async def test_a_long_prompts_tokens_are_shown_without_holding_up_the_event_loop(monkeypatch: pytest.MonkeyPatch):
    threads: set[threading.Thread] = set()
    known = FakeTokenizer.token_text

    def token_text(self: FakeTokenizer, token_id: int) -> str:
        threads.add(threading.current_thread())
        return known(self, token_id)

    monkeypatch.setattr(FakeTokenizer, "token_text", token_text)
    async with client(fake_app(FakeEngine(max_model_len=10_000))) as http:
        response = await http.post("/tokenize", json={"prompt": "x" * 5000, "return_token_strs": True})
    assert response.json()["token_strs"] == ["x"] * 5000
    assert threading.current_thread() not in threads


async def test_the_vocabulary_is_walked_before_the_first_request(monkeypatch: pytest.MonkeyPatch):
    app = fake_app(FakeEngine(max_model_len=10))
    monkeypatch.setattr(FakeTokenizer, "token_bytes", lambda *_: pytest.fail("walked while a request waits"))
    async with client(app) as http:
        response = await http.post("/tokenize", json={"prompt": "x" * 1000})
    assert response.json()["error"]["code"] == "context_length_exceeded"
