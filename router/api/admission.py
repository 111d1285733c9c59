"""Who may come in: a bounded queue for all, a bounded number of open requests per API key, and nobody while draining.

A sequence waits from its admission until its first token. Requests are counted before their prompt is tokenised,
prompt tokens as soon as they are known. Nothing is ever refused for its size alone: what exceeds a bound by itself
is admitted when nobody else waits.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from barista.errors import Overloaded
from router.api.errors import engine_failed
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

    @property
    def num_open(self) -> int:
        """Open requests."""
        return self._open.total()

    def drain(self) -> None:
        """Refuse every new request from now on; open ones go on."""
        self.draining = True

    async def wait_idle(self) -> None:
        """Returns when no request is open."""
        await self._idle.wait()

    def enter(self, key: bytes, num_sequences: int) -> Ticket:
        """Admit one request of `key` (b"" if nobody needs one).

        Raises Overloaded: 503 while draining or when the queue is full, 429 when the key has too many open requests.
        """
        if self.draining:
            raise Overloaded("The server is shutting down.", code="draining", retry_after=5)
        if key and self._open[key] >= self._settings.max_open_per_key:
            raise Overloaded("Too many open requests with this API key.", code="rate_limit", status=429, retry_after=1)
        if self.waiting_requests and self.waiting_requests + num_sequences > self._settings.max_waiting_requests:
            raise engine_failed("overloaded")
        return Ticket(self, key, num_sequences)

    def _opened(self, key: bytes, num_sequences: int) -> None:
        self._open[key] += 1
        self._idle.clear()
        self.waiting_requests += num_sequences

    def _closed(self, key: bytes) -> None:
        self._open[key] -= 1
        if not self._open[key]:
            del self._open[key]
        if not self._open:
            self._idle.set()

    def _queued(self, num_tokens: int) -> None:
        if self.waiting_tokens and self.waiting_tokens + num_tokens > self._settings.max_waiting_tokens:
            raise engine_failed("overloaded")
        self.waiting_tokens += num_tokens

    def _left_queue(self, num_sequences: int, num_tokens: int) -> None:
        self.waiting_requests -= num_sequences
        self.waiting_tokens -= num_tokens


class Ticket:
    """One admitted request. A context manager: leaving it takes back whatever it still counts."""

    def __init__(self, admission: Admission, key: bytes, num_sequences: int) -> None:
        self._admission = admission
        self._key = key
        self._waiting = dict.fromkeys(range(num_sequences), 0)  # sequence -> its counted prompt tokens
        admission._opened(key, num_sequences)

    def queue(self, prompt_lengths: Sequence[int]) -> None:
        """Count the prompt tokens of every sequence. Raises Overloaded (503) if too many wait already."""
        self._admission._queued(sum(prompt_lengths))
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
        self._admission._closed(self._key)
