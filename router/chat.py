"""Talking to a server from the terminal: the conversation, and the client that streams its answers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import httpx

from barista.errors import BaristaError
from router.server_client import ServerClient, as_barista_error, require_ok
from router.sse import DONE, EventData


class ChatClient(ServerClient):
    """One server's chat endpoint. sampling: fields of the request, those that are None left out."""

    def __init__(self, url: str, api_key: str | None = None, **sampling: object) -> None:
        super().__init__(url, api_key)
        self._sampling = {name: value for name, value in sampling.items() if value is not None}

    def answer(self, messages: list[dict[str, str]]) -> Generator[str, None, None]:
        """The answer to a conversation, piece by piece. Closing the iterator stops the server's work on it.

        Raises BaristaError with the server's own words when it refuses or fails.
        """
        body = {"messages": messages, "stream": True, **self._sampling}
        with as_barista_error(self.url), self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
            require_ok(response)
            events = EventData()
            for piece in response.iter_bytes():
                for data in events.feed(piece):
                    if data == DONE:
                        return
                    if content := _content(json.loads(data)):
                        yield content
        raise BaristaError("The answer broke off.", "Is the server still running?")


def _content(event: dict[str, Any]) -> str:
    if "error" in event:
        raise BaristaError(str(event["error"]["message"]))
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


@dataclass
class Conversation:
    """What was said so far. system: sent first with every request if there is one."""

    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """The request's messages."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.turns

    def say(self, client: ChatClient, text: str) -> Generator[str, None, None]:
        """Ask, and yield the answer's pieces. Both are kept once anything was answered, also if it was cut short."""
        self.turns.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            with contextlib.closing(client.answer(self.messages())) as answer:
                for piece in answer:
                    pieces.append(piece)
                    yield piece
        finally:
            if pieces:
                self.turns.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.turns.pop()
