"""The API's side of the engine: submit, abort, status, events. No torch, no waiting for a step."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from router.messages import Failed, ModelInfo, SamplingParams, Stats, Token


class EngineClient(Protocol):
    """What the API needs of an engine. Tests give it a fake one."""

    @property
    def ready(self) -> bool:
        """True once the engine serves, False again when it has died."""
        ...

    @property
    def model(self) -> ModelInfo:
        """The loaded model. Raises EngineFailed before `ready`."""
        ...

    def submit(
        self, request_id: str, prompt_token_ids: tuple[int, ...], sampling: SamplingParams, salt: bytes = b""
    ) -> AsyncIterator[Token | Failed]:
        """Start one sequence. The iterator ends after a Token with a finish_reason or after a Failed.

        Closing the iterator early (aclose, or a cancelled task) aborts the request.
        A dead engine ends every open iterator with Failed(code="engine_dead").
        """
        ...

    async def stats(self) -> Stats:
        """A fresh Stats. Raises EngineFailed if the engine is dead."""
        ...
