"""One sequence's tokens as text: detokenised, without special tokens, cut at a stop string."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from router.api.responses import FinishReason
from router.api.stop import StopChecker
from router.messages import Token
from router.tokenizer import IncrementalDecoder, Tokenizer


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
    """The text of one sequence as it grows. index: the number of the choice in its answer."""

    def __init__(self, index: int, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self._index = index
        self._decoder = IncrementalDecoder(tokenizer)
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
