"""Stop strings on a stream of text pieces.

The match that counts is the one that is complete first (the longest, if two end together): the only choice that does
not depend on how the text was split into pieces, and the earliest moment at which generation can stop.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopChecker:
    """Passes text through and cuts it before the first stop string.

    Only text that may still become part of a stop string is held back: at most max(len(stop)) - 1 characters.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """Take the next piece; returns what may be shown. Nothing more is shown once `matched` is True."""
        if self.matched:
            return ""
        text = self._held + text
        start = self._first_match(text)
        if start is not None:
            self.matched, self._held = True, ""
            return text[:start]
        keep = len(text) - self._partial_match(text)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """The text ends here; returns what was held back."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> int | None:
        """Where the stop string starts that ends first in `text`."""
        found = [(text.find(stop), len(stop)) for stop in self._stops]
        ends = [(start + length, start) for start, length in found if start >= 0]
        return min(ends)[1] if ends else None

    def _partial_match(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
