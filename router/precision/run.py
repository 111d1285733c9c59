"""One model reading windows of text: its logits and its gates' choices, and how long a token takes it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from barista.errors import CheckpointError
from experts.pool import DispatchBatch, Transport
from router.kv_cache.storage import allocate_cache
from router.model.batch import Batch
from router.model.load import Model

PROMPT_TOKENS = 32  # read before decoding is timed
WARM_STEPS, TIMED_STEPS = 8, 64
DECODE_TOKENS = PROMPT_TOKENS + WARM_STEPS + TIMED_STEPS


@dataclass(frozen=True, slots=True)
class WindowRead:
    """logits: [length, vocab] float32. topk_ids: [num_moe_layers, length, k] int32, no layers for a dense model."""

    logits: torch.Tensor
    topk_ids: torch.Tensor


class Choices:
    """A transport that notes which experts were chosen, layer by layer, on their way to the one below it."""

    def __init__(self, below: Transport) -> None:
        self._below = below
        self._topk_ids: list[torch.Tensor] = []

    def dispatch(self, batch: DispatchBatch) -> Any:
        """As Transport."""
        self._topk_ids.append(batch.topk_ids.clone())
        return self._below.dispatch(batch)

    def combine(self, ticket: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As Transport."""
        return self._below.combine(ticket)

    def take(self) -> torch.Tensor:
        """[num_dispatches, num_tokens, k] int32 since the last call."""
        taken = torch.stack(self._topk_ids)
        self._topk_ids.clear()
        return taken


def read_windows(model: Model, windows: Sequence[Sequence[int]]) -> Iterator[WindowRead]:
    """Each window alone, from an empty cache. Raises CheckpointError for values that are not finite."""
    if model.pool is None:
        for window in windows:
            yield WindowRead(Reader(model, len(window)).read(window), torch.empty(0, len(window), 0, dtype=torch.int32))
        return
    with model.pool.through(Choices) as choices:
        for window in windows:
            yield WindowRead(Reader(model, len(window)).read(window), choices.take())


def decode_seconds(model: Model, token_ids: Sequence[int]) -> list[float]:
    """Seconds of each of TIMED_STEPS steps of one token, behind a prompt; the tokens are those of a text, so that every
    format does the same work. token_ids: repeated where they are too few."""
    ids = list(itertools.islice(itertools.cycle(token_ids), DECODE_TOKENS))
    reader = Reader(model, DECODE_TOKENS)
    reader.read(ids[:PROMPT_TOKENS])
    seconds = []
    for token in ids[PROMPT_TOKENS:]:
        started = time.perf_counter()
        reader.read([token])
        seconds.append(time.perf_counter() - started)
    return seconds[WARM_STEPS:]


class Reader:
    """One sequence and its cache, without a scheduler: nothing else runs."""

    def __init__(self, model: Model, max_tokens: int) -> None:
        self._model = model
        self._cache = allocate_cache(model.spec, 1, max_tokens, model.dtype)  # one block, which holds it all
        self._length = 0
        self._steps = 0

    @torch.inference_mode()
    def read(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits [len(token_ids), vocab] float32 after each of the tokens that follow."""
        count = len(token_ids)
        positions = torch.arange(self._length, self._length + count, dtype=torch.int32)
        batch = Batch(
            token_ids=torch.tensor(token_ids, dtype=torch.int32),
            positions=positions,
            seq_ids=torch.zeros(count, dtype=torch.int32),
            slots=positions,
            block_tables=torch.zeros(1, 1, dtype=torch.int32),
            sample_rows=torch.arange(count),
        )
        logits, failed = self._model.trunk.forward(batch, self._cache, self._steps)
        # By numpy: torch would wake threads of its own beside those of the kernels, and be timed with the step.
        if failed.numpy().any() or not np.isfinite(logits.numpy()).all():
            raise CheckpointError(
                "The model gave values that are not finite.", "Leave this format out: name the others with --formats."
            )
        self._length += count
        self._steps += 1
        return logits
