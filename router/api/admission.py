"""Who may come in: a bounded queue for all, a bounded number of open sequences per API key, and nobody while draining.

A sequence waits from its admission until its first token. Sequences are counted before their prompt is tokenised,
prompt tokens as soon as they are known. One sequence is never refused for its size alone: if it exceeds a bound by
itself, it is admitted when nobody else waits. Several sequences in one request that exceed a bound are refused for
good: the client can send them one by one.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from barista.errors import InvalidRequest, Overloaded
from router.api.settings import ApiSettings


class Admission:
    """The counts. Lives on one event loop; nothing here awaits but `wait_idle`."""

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings
        self._open: Counter[bytes] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        self.waiting_requests = 0
        self.waiting_tokens = 0

    def drain(self) -> None:
        """Refuse every new request from now on; open ones go on."""
        self.draining = True

    async def wait_idle(self) -> None:
        """Returns when no request is open."""
        await self._idle.wait()

    def enter(self, key: bytes, num_sequences: int) -> Ticket:
        """Admit one request of `key` (b"" if nobody needs one).

        Raises Overloaded: 503 while draining or when the queue is full, 429 when the key has too many open sequences.
        Raises InvalidRequest for more sequences than can ever be admitted together.
        """
        settings = self._settings
        if self.draining:
            raise Overloaded("The server is shutting down.", code="draining", retry_after=5)
        limit = min(settings.max_waiting_requests, settings.max_open_per_key) if key else settings.max_waiting_requests
        if num_sequences > 1 and num_sequences > limit:
            raise InvalidRequest(
                f"The request asks for {num_sequences} answers; at most {limit} are served at once. Send fewer prompts "
                "or a smaller n."
            )
        if key and self._open[key] and self._open[key] + num_sequences > settings.max_open_per_key:
            raise Overloaded("Too many open requests with this API key.", code="rate_limit", status=429, retry_after=1)
        if self.waiting_requests and self.waiting_requests + num_sequences > settings.max_waiting_requests:
            raise busy()
        return Ticket(self, key, num_sequences)

    def _opened(self, key: bytes, num_sequences: int) -> None:
        self._open[key] += num_sequences
        self._idle.clear()
        self.waiting_requests += num_sequences

    def _closed(self, key: bytes, num_sequences: int) -> None:
        self._open[key] -= num_sequences
        if not self._open[key]:
            del self._open[key]
        if not self._open:
            self._idle.set()

    def _queued(self, num_tokens: int, num_sequences: int) -> None:
        limit = self._settings.max_waiting_tokens
        if num_sequences > 1 and num_tokens > limit:
            raise InvalidRequest(
                f"The prompts of all answers hold {num_tokens} tokens; at most {limit} are served at once. Send fewer "
                "prompts or a smaller n."
            )
        if self.waiting_tokens and self.waiting_tokens + num_tokens > limit:
            raise busy()
        self.waiting_tokens += num_tokens

    def _left_queue(self, num_sequences: int, num_tokens: int) -> None:
        self.waiting_requests -= num_sequences
        self.waiting_tokens -= num_tokens


class Ticket:
    """One admitted request. A context manager: leaving it takes back whatever it still counts."""

    def __init__(self, admission: Admission, key: bytes, num_sequences: int) -> None:
        self._admission = admission
        self._key = key
        self._num_sequences = num_sequences
        self._waiting = dict.fromkeys(range(num_sequences), 0)  # sequence -> its counted prompt tokens
        admission._opened(key, num_sequences)

    def queue(self, prompt_lengths: Sequence[int]) -> None:
        """Count the prompt tokens of every sequence.

        Raises Overloaded (503) if too many wait already, InvalidRequest if several sequences hold too many together.
        """
        self._admission._queued(sum(prompt_lengths), len(prompt_lengths))
        self._waiting = dict(enumerate(prompt_lengths))

    def started(self, sequence: int) -> None:
        """A sequence has a token: it waits no longer."""
        if sequence in self._waiting:
            self._admission._left_queue(1, self._waiting.pop(sequence))

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._admission._left_queue(len(self._waiting), sum(self._waiting.values()))
        self._admission._closed(self._key, self._num_sequences)


def busy() -> Overloaded:
    """The answer when the queue is full."""
    return Overloaded("The server is busy. Send the request again later.", code="overloaded", retry_after=2)
