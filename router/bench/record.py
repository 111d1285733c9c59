"""What became of one request: an Answer or a Failure. Times are seconds of one monotonic clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A stream that came to its end.

    start: when its user came: in an open loop the scheduled arrival, however late it was sent, so that a slow server
    cannot hide its queue by slowing the load (coordinated omission); in a closed loop when it was sent. sent: when it
    was sent. chunks: when each chunk with text arrived; at least one. end: when the stream said that it was complete.
    prompt_tokens, completion_tokens: the server's own counts (usage), or None.
    """

    start: float
    sent: float
    chunks: tuple[float, ...]
    end: float
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def output_tokens(self) -> int:
        """The server's count; without one, the chunks with text, which are fewer where chunks hold several tokens."""
        return self.completion_tokens or len(self.chunks)

    @property
    def ttft(self) -> float:
        """Time to first token: from start to the first chunk with text. A chunk with the role alone is no token."""
        return self.chunks[0] - self.start

    @property
    def e2el(self) -> float:
        """End-to-end latency, from start to the end of the stream."""
        return self.end - self.start

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first: (e2el - ttft) / (output_tokens - 1), None for a single token.

        It counts tokens, so it does not depend on how many of them share a chunk.
        """
        return (self.e2el - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: the gaps between successive chunks with text, in which a reader sees nothing new.

        Tokens that share a chunk have no gap between them. Counting zeros for them, or dividing a gap among them, would
        hide the stalls that this distribution is there to show; so it is per token only where a chunk holds one.
        """
        return [after - before for before, after in zip(self.chunks, self.chunks[1:], strict=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A request without a whole answer; it has no latency.

    kind: connect (no connection), http_STATUS, timeout (no whole answer in time), broken_stream (the connection or the
    stream ended early), error_event (the stream held an error), bad_answer (no OpenAI stream), empty (no text).
    """

    start: float
    end: float
    kind: str
    message: str
    remedy: str = ""


Record = Answer | Failure
