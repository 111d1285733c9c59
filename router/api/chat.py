"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from barista.errors import InvalidRequest
from router.api.answers import answer, request_id, shown_logprob
from router.api.choice import Delta
from router.api.generation import Generation, Prompts
from router.api.json_body import StrictJsonRoute
from router.api.openapi import EVENT_STREAM, GENERATION_ERRORS
from router.api.responses import ChatChunkChoice, ChatCompletion, ChatLogprob, TopLogprob
from router.api.schemas import ChatCompletionRequest
from router.api.service import Service
from router.tokenizer import Tokenizer


class ChatFormat:
    """Choices as messages. logprobs: whether the client wants them."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._begun: set[int] = set()

    def whole(self, index: int, deltas: Sequence[Delta]) -> Mapping[str, Any]:
        """A complete message."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(delta.text for delta in deltas), "refusal": None},
            "logprobs": {"content": [self._logprob(delta) for delta in deltas]} if self._logprobs else None,
            "finish_reason": deltas[-1].finish_reason,
        }

    def chunks(self, delta: Delta) -> list[Mapping[str, Any]]:
        """The role first, then text as it comes; a delta that shows nothing makes no chunk."""
        chunks: list[ChatChunkChoice] = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            role: ChatChunkChoice = {
                "index": delta.index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            chunks.append(role)
        if delta.text or delta.finish_reason or self._logprobs:
            chunks.append(
                {
                    "index": delta.index,
                    "delta": {"content": delta.text} if delta.text else {},
                    "logprobs": {"content": [self._logprob(delta)]} if self._logprobs else None,
                    "finish_reason": delta.finish_reason,
                }
            )
        return list(chunks)

    def _logprob(self, delta: Delta) -> ChatLogprob:
        token = delta.token
        top = [self._entry(token_id, logprob) for token_id, logprob in token.top_logprobs]
        return {**self._entry(token.token_id, token.logprob), "top_logprobs": top}

    def _entry(self, token_id: int, logprob: float | None) -> TopLogprob:
        return {
            "token": self._tokenizer.token_text(token_id),
            "logprob": shown_logprob(logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


def chat_router(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(route_class=StrictJsonRoute)

    @router.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={**GENERATION_ERRORS, 200: EVENT_STREAM},
    )
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a chat, whole or as a stream of server-sent events."""
        generation = chat_generation(service, request.scope["barista.key"], body)
        return answer(service, body, generation, ChatFormat(service.tokenizer, generation.logprobs is not None))

    return router


def chat_generation(service: Service, key: bytes, body: ChatCompletionRequest) -> Generation:
    """The answer to a chat, not begun. key: as of Generation. Raises RequestError."""
    service.loaded_model(body.model)

    async def prepare() -> Prompts:
        text = await service.render(body.messages, body.chat_template_kwargs)
        return [await service.encode(text, add_special_tokens=False, param="messages")]

    return Generation(
        service,
        request_id("chatcmpl"),
        key,
        body,
        prepare,
        num_prompts=1,
        max_tokens=_max_tokens(body),
        logprobs=_logprobs(body),
    )


def _max_tokens(body: ChatCompletionRequest) -> int | None:
    """The limit under its new or its old name. Raises InvalidRequest if the two differ."""
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise InvalidRequest("Send either max_tokens or max_completion_tokens", param="max_tokens")
    return body.max_completion_tokens or body.max_tokens


def _logprobs(body: ChatCompletionRequest) -> int | None:
    """How many alternatives to report. Raises InvalidRequest for top_logprobs without logprobs, as OpenAI does."""
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None
