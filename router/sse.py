"""Server-sent events as a client reads them (WHATWG HTML section 9.2)."""

from __future__ import annotations

DONE = "[DONE]"  # the data of the last event of an OpenAI stream


class EventData:
    """The data of each event of one stream, from the pieces in which its bytes arrive."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[str]:
        """The data that this piece completes. Split at newlines only: U+2028 and the like are part of an answer."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        return [line[len(b"data:") :].strip().decode() for line in lines if line.startswith(b"data:")]
