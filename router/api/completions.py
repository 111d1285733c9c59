"""POST /v1/completions: text or token ids in, text out."""

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
from router.api.responses import Completion, CompletionChoice, CompletionLogprobs
from router.api.schemas import CompletionRequest
from router.api.service import Service
from router.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # as OpenAI and vLLM


class CompletionFormat:
    """Choices as texts.

    logprobs: whether the client wants them. prefixes: what each prompt's choices begin with (`echo`), or empty.
    n: choices per prompt.
    """

    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, tokenizer: Tokenizer, logprobs: bool, prefixes: Sequence[str], n: int) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._prefixes = prefixes
        self._n = n

    def whole(self, index: int, deltas: Sequence[Delta]) -> Mapping[str, Any]:
        """A complete text."""
        return self._choice(deltas)

    def chunks(self, delta: Delta) -> list[Mapping[str, Any]]:
        """One chunk, or none for a delta that shows nothing."""
        choice = self._choice([delta])
        return [choice] if choice["text"] or delta.finish_reason or self._logprobs else []

    def _choice(self, deltas: Sequence[Delta]) -> CompletionChoice:
        first, last = deltas[0], deltas[-1]
        prefix = self._prefixes[first.index // self._n] if self._prefixes and first.token.index == 0 else ""
        return {
            "index": first.index,
            "text": prefix + "".join(delta.text for delta in deltas),
            "logprobs": self._all_logprobs(deltas) if self._logprobs else None,
            "finish_reason": last.finish_reason,
        }

    def _all_logprobs(self, deltas: Sequence[Delta]) -> CompletionLogprobs:
        text = self._tokenizer.token_text
        return {
            "tokens": [text(delta.token.token_id) for delta in deltas],
            "token_logprobs": [shown_logprob(delta.token.logprob) for delta in deltas],
            "top_logprobs": [self._top(delta) for delta in deltas],
            "text_offset": [delta.offset for delta in deltas],
        }

    def _top(self, delta: Delta) -> dict[str, float]:
        """The alternatives and the drawn token, best first where the texts differ."""
        drawn = (delta.token.token_id, delta.token.logprob)
        pairs = [*delta.token.top_logprobs, drawn]
        return {self._tokenizer.token_text(token_id): shown_logprob(logprob) for token_id, logprob in pairs}


def completions_router(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter(route_class=StrictJsonRoute)

    @router.post(
        "/v1/completions",
        response_model=Completion,
        responses={**GENERATION_ERRORS, 200: EVENT_STREAM},
    )
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or several, whole or as a stream of server-sent events."""
        generation = completion_generation(service, request.scope["barista.key"], body)
        if body.echo and body.logprobs is not None:
            raise InvalidRequest("echo cannot be combined with logprobs", param="echo")
        prefixes = [_shown(service, prompt) for prompt in body.prompts] if body.echo else []
        fmt = CompletionFormat(service.tokenizer, body.logprobs is not None, prefixes, body.n or 1)
        return answer(service, body, generation, fmt)

    return router


def completion_generation(service: Service, key: bytes, body: CompletionRequest) -> Generation:
    """What continues the prompts, not begun. key: as of Generation. Raises RequestError."""
    service.loaded_model(body.model)
    prompts = body.prompts

    async def prepare() -> Prompts:
        return [await _encode(service, prompt) for prompt in prompts]

    return Generation(
        service,
        request_id("cmpl"),
        key,
        body,
        prepare,
        num_prompts=len(prompts),
        max_tokens=body.max_tokens,
        logprobs=body.logprobs,
        default_max_tokens=DEFAULT_MAX_TOKENS,
    )


async def _encode(service: Service, prompt: str | list[int]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return await service.encode(prompt, add_special_tokens=True)
    return service.check_prompt_ids(prompt)


def _shown(service: Service, prompt: str | list[int]) -> str:
    """The prompt as text, for `echo`."""
    if isinstance(prompt, str):
        return prompt
    return service.tokenizer.decode(list(service.check_prompt_ids(prompt)), skip_special_tokens=True)
