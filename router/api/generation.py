"""One request's life between the edge and the engine: admitted, tokenised, run as n sequences, merged, and let go.

Everything happens inside one async generator, so closing it (a client that left, a failed sibling, a cancelled task)
takes back all of it: tickets, tasks and, through the engine's iterators, KV blocks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

from barista.errors import InvalidRequest, RequestError
from router.api.admission import Ticket
from router.api.errors import engine_failed
from router.api.responses import FinishReason, Usage
from router.api.sampling import sampling_params
from router.api.schemas import GenerateRequest
from router.api.service import Service, cache_salt
from router.api.stop import StopChecker
from router.messages import Failed, SamplingParams, Token
from router.tokenizer import IncrementalDecoder

Prompts = list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one token adds to one choice.

    text: what may be shown now; "" while a character or a stop string is incomplete. offset: characters shown before.
    """

    index: int
    text: str
    token: Token
    offset: int
    finish_reason: FinishReason | None


class Choice:
    """Turns one sequence's tokens into text: detokenised, without special tokens, cut at a stop string."""

    def __init__(self, index: int, service: Service, stops: tuple[str, ...]) -> None:
        self._index = index
        self._decoder = IncrementalDecoder(service.tokenizer)
        self._stop = StopChecker(stops)
        self._offset = 0

    def push(self, token: Token) -> Delta:
        """The next token. An EOS or stop token (finish_reason "stop") has no text."""
        text = "" if token.finish_reason == "stop" else self._stop.push(self._decoder.push(token.token_id))
        if token.finish_reason and not self._stop.matched:
            text += self._stop.push(self._decoder.flush()) + self._stop.flush()
        reason = cast("FinishReason | None", "stop" if self._stop.matched else token.finish_reason)
        delta = Delta(self._index, text, token, self._offset, reason)
        self._offset += len(text)
        return delta


class Generation:
    """One request: `deltas` runs it, `usage` tells what it took.

    prepare: coroutine function that returns the token ids of every prompt; choice i of prompt p has index p * n + i.
    max_tokens, logprobs: as for sampling_params.
    """

    def __init__(
        self,
        service: Service,
        request_id: str,
        key: bytes,
        body: GenerateRequest,
        prepare: Callable[[], Awaitable[Prompts]],
        *,
        num_prompts: int,
        max_tokens: int | None,
        logprobs: int | None,
    ) -> None:
        self._service = service
        self._request_id = request_id
        self._key = key
        self._body = body
        self._prepare = prepare
        self._num_prompts = num_prompts
        self._max_tokens = max_tokens
        self._logprobs = logprobs
        self._arrival = time.perf_counter()
        self._num_prompt_tokens = self._num_completion_tokens = self._num_cached_tokens = 0

    def usage(self) -> Usage:
        """Token counts so far. A prompt counts once, however many choices it has."""
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._num_cached_tokens},
        }

    async def deltas(self) -> AsyncGenerator[Delta]:
        """One Delta per token, the choices interleaved as they come; the last of each has a finish_reason.

        Raises RequestError: refused (nothing was yielded yet) or failed in the engine. One failed choice fails all.
        """
        num_choices = self._num_choices()
        try:
            with self._service.admission.enter(self._key, num_choices) as ticket:
                sequences = await self._sequences()
                ticket.queue([len(prompt) for prompt, _ in sequences])
                async with aclosing(self._merge(sequences, ticket)) as deltas:
                    async for delta in deltas:
                        yield delta
        except RequestError as error:
            self._service.metrics.request_failed(error.status, error.code)
            raise

    def _num_choices(self) -> int:
        """How many sequences this request is. Raises InvalidRequest above the server's bounds."""
        settings, n = self._service.settings, self._body.n or 1
        if n > settings.max_n:
            raise InvalidRequest(f"n: {n} is more than {settings.max_n}", param="n")
        if self._num_prompts > settings.max_prompts:
            raise InvalidRequest(f"prompt: {self._num_prompts} is more than {settings.max_prompts}", param="prompt")
        return n * self._num_prompts

    async def _sequences(self) -> list[tuple[tuple[int, ...], SamplingParams]]:
        """Prompt and sampling of every choice, in the order of their indices."""
        model = self._service.loaded_model()
        sequences = []
        for prompt in await self._prepare():
            if not prompt:
                raise InvalidRequest("The prompt is empty: send at least one token.", param="prompt")
            choices = sampling_params(
                self._body,
                model,
                num_prompt_tokens=len(prompt),
                max_tokens=self._max_tokens,
                logprobs=self._logprobs,
            )
            self._num_prompt_tokens += len(prompt)
            sequences += [(prompt, sampling) for sampling in choices]
        self._service.metrics.prompt_tokens.inc(self._num_prompt_tokens)
        return sequences

    async def _merge(
        self, sequences: list[tuple[tuple[int, ...], SamplingParams]], ticket: Ticket
    ) -> AsyncGenerator[Delta]:
        """All choices' deltas as they come. Leaving early cancels the tasks, which close the engine's iterators."""
        arrived: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        runs = [self._run(index, *sequence, ticket, arrived) for index, sequence in enumerate(sequences)]
        tasks = [asyncio.create_task(run) for run in runs]
        num_running = len(tasks)
        try:
            while num_running:
                delta = await arrived.get()
                if isinstance(delta, Exception):
                    raise delta
                num_running -= delta.finish_reason is not None
                yield delta
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(
        self,
        index: int,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        ticket: Ticket,
        arrived: asyncio.Queue[Delta | Exception],
    ) -> None:
        """Put every Delta of one choice into `arrived`, or the exception that ended it."""
        try:
            last = await self._drive(index, prompt, sampling, ticket, arrived)
        except Exception as error:  # noqa: BLE001  # raised again by _merge, in the task that answers the client
            arrived.put_nowait(error)
        else:
            # After the iterator was closed: whoever sees the last delta may cancel this task.
            arrived.put_nowait(last)

    async def _drive(
        self,
        index: int,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        ticket: Ticket,
        arrived: asyncio.Queue[Delta | Exception],
    ) -> Delta:
        """Run one sequence until it ends or a stop string cuts it; returns its last Delta."""
        choice = Choice(index, self._service, self._body.stops)
        timer = self._service.metrics.timer(self._arrival)
        submitted = self._service.engine.submit(f"{self._request_id}-{index}", prompt, sampling, cache_salt(self._key))
        async with aclosing(cast("AsyncGenerator[Token | Failed]", submitted)) as tokens:
            async for token in tokens:
                if isinstance(token, Failed):
                    raise engine_failed(token.code)
                ticket.started(index)
                timer.token()
                self._count(index, token)
                delta = choice.push(token)
                if delta.finish_reason:
                    timer.finished(delta.finish_reason)
                    return delta
                arrived.put_nowait(delta)
        raise engine_failed("internal")

    def _count(self, index: int, token: Token) -> None:
        self._num_completion_tokens += 1
        if token.index == 0 and index % (self._body.n or 1) == 0:
            self._num_cached_tokens += token.num_cached_tokens
