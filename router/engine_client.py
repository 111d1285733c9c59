"""The API's side of the engine: submit, abort, status, events. No torch, no waiting for a step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from router.messages import Failed, ModelInfo, PoolAddress, Stats, Submit, Token


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

    def submit(self, request: Submit) -> AsyncIterator[Token | Failed]:
        """Start one sequence. The iterator ends after a Token with a finish_reason or after a Failed.

        Closing the iterator early (aclose, or a cancelled task) aborts the request.
        A dead engine ends every open iterator with Failed(code="engine_dead").
        """
        ...

    async def stats(self) -> Stats:
        """A fresh Stats. Raises EngineFailed if the engine is dead."""
        ...

    async def makes_progress(self) -> bool:
        """False once it has said nothing for minutes although it was asked: starting it anew would help."""
        ...


class StartableEngine(EngineClient, Protocol):
    """An EngineClient as its server sees it. died: set when it has gone for good."""

    died: asyncio.Event

    async def start(self, on_progress: Callable[[float, str], None], pool: PoolAddress | None = None) -> None:
        """Returns when it serves. pool: where its experts are, if not with it. Raises BaristaError."""
        ...

    async def close(self) -> None:
        """End it, or the connection to it. Every open request gets its Failed event."""
        ...
