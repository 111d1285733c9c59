"""From deltas to an answer: collected whole, or one event per delta. Chat and completions differ in a `Format` only."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import Response

from router.api.choice import Delta
from router.api.generation import Generation
from router.api.schemas import GenerateRequest
from router.api.service import Service
from router.api.stream import DONE, EventStream, JsonAnswer, event

LOWEST_LOGPROB = -9999.0  # what OpenAI reports for log(0), which JSON cannot write


class Format(Protocol):
    """How one route shows choices.

    object, chunk_object: names of the answer and of a stream's chunks.
    """

    object: str
    chunk_object: str

    def whole(self, index: int, deltas: Sequence[Delta]) -> Mapping[str, Any]:
        """A complete choice from all of its deltas."""
        ...

    def chunks(self, delta: Delta) -> list[Mapping[str, Any]]:
        """What a stream shows of one delta: no, one or more chunk choices."""
        ...


def request_id(prefix: str) -> str:
    """A fresh id of an answer."""
    return f"{prefix}-{secrets.token_hex(16)}"


def answer(service: Service, body: GenerateRequest, generation: Generation, fmt: Format) -> Response:
    """The HTTP answer, a stream if the request asks for one."""
    if not body.stream:
        return JsonAnswer(_collect(service, generation, fmt), service.metrics)
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    return EventStream(_events(service, generation, fmt, include_usage), service.metrics)


def shown_logprob(logprob: float | None) -> float:
    """A logarithm that JSON can carry."""
    return LOWEST_LOGPROB if logprob is None else max(logprob, LOWEST_LOGPROB)


def _envelope(service: Service, answer_id: str, name: str) -> dict[str, Any]:
    return {
        "id": answer_id,
        "object": name,
        "created": int(time.time()),
        "model": service.settings.model_id,
        "system_fingerprint": service.engine.model.numerics_id,
    }


async def _collect(service: Service, generation: Generation, fmt: Format) -> dict[str, Any]:
    choices: dict[int, list[Delta]] = {}
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            choices.setdefault(delta.index, []).append(delta)
    whole = [fmt.whole(index, choices[index]) for index in sorted(choices)]
    return _envelope(service, generation.answer_id, fmt.object) | {"choices": whole, "usage": generation.usage()}


async def _events(service: Service, generation: Generation, fmt: Format, include_usage: bool) -> AsyncGenerator[bytes]:
    chunk: dict[str, Any] = {}
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            chunk = chunk or _envelope(service, generation.answer_id, fmt.chunk_object) | (
                {"usage": None} if include_usage else {}
            )
            for choice in fmt.chunks(delta):
                yield event(chunk | {"choices": [choice]})
    if include_usage:
        yield event(chunk | {"choices": [], "usage": generation.usage()})
    yield DONE
