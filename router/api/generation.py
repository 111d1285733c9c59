"""One request's life between the edge and the engine: admitted, tokenised, run as n sequences, merged, and let go.

Everything happens inside one async generator, so closing it (a client that left, a failed sibling, a cancelled task)
takes back all of it: tickets, tasks and, through the engine's iterators, KV blocks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

from barista.errors import InvalidRequest, RequestError
from router.api.admission import Ticket
from router.api.choice import Choice, Delta
from router.api.errors import engine_failed
from router.api.responses import Usage
from router.api.sampling import sampling_params
from router.api.schemas import GenerateRequest
from router.api.service import Service, cache_salt
from router.messages import Failed, SamplingParams, Submit, Token

Prompts = list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class PlannedChoice:
    """What the engine is asked for one choice."""

    index: int
    prompt: tuple[int, ...]
    sampling: SamplingParams


@dataclass
class Generation:
    """One request: `deltas` runs it, `usage` tells what it took.

    key: digest of the caller's API key, or b"". prepare: returns the token ids of every prompt; choice i of prompt p
    has index p * n + i. max_tokens, default_max_tokens, logprobs: as for sampling_params.
    """

    service: Service
    answer_id: str
    key: bytes
    body: GenerateRequest
    prepare: Callable[[], Awaitable[Prompts]]
    num_prompts: int
    max_tokens: int | None
    logprobs: int | None
    default_max_tokens: int | None = None
    _arrival: float = field(default_factory=time.perf_counter, init=False)
    _num_prompt_tokens: int = field(default=0, init=False)
    _num_completion_tokens: int = field(default=0, init=False)
    _num_cached_tokens: int = field(default=0, init=False)

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
        try:
            with self.service.admission.enter(self.key, self._num_choices()) as ticket:
                sequences = await self._sequences()
                ticket.queue([len(sequence.prompt) for sequence in sequences])
                self.service.metrics.prompt_tokens.inc(self._num_prompt_tokens)
                async with aclosing(self._merge(sequences, ticket)) as deltas:
                    async for delta in deltas:
                        yield delta
        except RequestError as error:
            self.service.metrics.request_failed(error.status, error.code)
            raise

    def _num_choices(self) -> int:
        """How many sequences this request is. Raises InvalidRequest above the server's bounds."""
        settings, n = self.service.settings, self.body.n or 1
        if n > settings.max_n:
            raise InvalidRequest(f"n: {n} is more than {settings.max_n}", param="n")
        if self.num_prompts > settings.max_prompts:
            raise InvalidRequest(f"prompt: {self.num_prompts} is more than {settings.max_prompts}", param="prompt")
        return n * self.num_prompts

    async def _sequences(self) -> list[PlannedChoice]:
        """Prompt and sampling of every choice, in the order of their indices."""
        model = self.service.loaded_model()
        sequences: list[PlannedChoice] = []
        for prompt in await self.prepare():
            if not prompt:
                raise InvalidRequest("The prompt is empty: send at least one token.", param="prompt")
            choices = sampling_params(
                self.body,
                model,
                num_prompt_tokens=len(prompt),
                max_tokens=self.max_tokens,
                default_max_tokens=self.default_max_tokens,
                logprobs=self.logprobs,
            )
            self._num_prompt_tokens += len(prompt)
            sequences += [PlannedChoice(i, prompt, sampling) for i, sampling in enumerate(choices, len(sequences))]
        return sequences

    async def _merge(self, sequences: list[PlannedChoice], ticket: Ticket) -> AsyncGenerator[Delta]:
        """All choices' deltas as they come. Leaving early cancels the tasks, which close the engine's iterators."""
        arrived: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        tasks = [asyncio.create_task(self._run(sequence, ticket, arrived)) for sequence in sequences]
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

    async def _run(self, sequence: PlannedChoice, ticket: Ticket, arrived: asyncio.Queue[Delta | Exception]) -> None:
        """Put every Delta of one choice into `arrived`, or the exception that ended it."""
        try:
            last = await self._drive(sequence, ticket, arrived)
        except Exception as error:  # noqa: BLE001  # raised again by _merge, in the task that answers the client
            arrived.put_nowait(error)
        else:
            # Only now, with the engine's iterator closed: whoever sees the last delta may cancel this task.
            arrived.put_nowait(last)

    async def _drive(self, sequence: PlannedChoice, ticket: Ticket, arrived: asyncio.Queue[Delta | Exception]) -> Delta:
        """Run one sequence until it ends or a stop string cuts it; returns its last Delta, all others have arrived."""
        choice = Choice(sequence.index, self.service.tokenizer, self.body.stops)
        timer = self.service.metrics.timer(self._arrival)
        request_id = f"{self.answer_id}-{sequence.index}"
        submit = Submit(request_id, sequence.prompt, sequence.sampling, cache_salt(self.key))
        events = self.service.engine.submit(submit)
        async with aclosing(cast("AsyncGenerator[Token | Failed]", events)) as tokens:
            async for token in tokens:
                if isinstance(token, Failed):
                    raise engine_failed(token.code)
                ticket.started(sequence.index)
                timer.token()
                self._count(sequence.index, token)
                delta = choice.push(token)
                if delta.finish_reason:
                    timer.finished(delta.finish_reason)
                    return delta
                arrived.put_nowait(delta)
        raise engine_failed("internal")

    def _count(self, index: int, token: Token) -> None:
        self._num_completion_tokens += 1
        if token.index == 0 and index % (self.body.n or 1) == 0:
            self._num_cached_tokens += token.num_cached_tokens
