"""What the engine computes in each step: a pure state machine over sequences and KV blocks. No tensors, no clocks.

The policy, in the order in which `schedule` applies it:

1. **Decode first.** Every running sequence with one uncomputed token gets it, in arrival order.
2. **Prefill next**, in chunks, in arrival order, from what is left of `max_num_batched_tokens`. A chunk may end
   anywhere: the kernels give a position the same bytes in every chunking.
3. **Admission is first come, first served.** The head of the queue is admitted when a slot (`max_num_seqs`), a token
   of budget and the blocks for *all* its known tokens are there, beside one spare block for each sequence that already
   runs, so that the next block boundaries do not undo the admission. Nobody overtakes a head that must wait. Prefill
   therefore never runs out of blocks; only decode grows. Cached blocks of the prefix are shared, not computed.
4. **When blocks run out the sequence that arrived last is preempted**: its blocks are released and it goes back to the
   head of the queue, keeping the tokens it has drawn. Prompt and drawn tokens are computed again later (most of it
   still lies in the prefix cache), to the same bytes, and draws depend on the seed and the token's index alone, so no
   answer changes. The oldest is never preempted, and `add` refuses what could not run alone: there is always progress.

All that runs arrived before all that waits, so `running` and `waiting` are both in arrival order at all times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from barista.errors import ConfigError, InvalidRequest
from router.kv_cache.blocks import BlockPool, chain_keys
from router.request import Sequence, Status


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Positions [start, start + num_tokens) of one sequence. samples: the last one's logits give the next token."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute."""
        return self.sequence.token_ids(self.start, self.start + self.num_tokens)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step's work: decodes first, each sequence at most once. Empty when there is nothing to do."""

    chunks: tuple[ScheduledChunk, ...]

    @property
    def num_tokens(self) -> int:
        """Rows of the step's forward pass."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that draw a token in this step, in the order of the chunks."""
        return [chunk.sequence for chunk in self.chunks if chunk.samples]


class Scheduler:
    """Call `schedule`, compute the plan, call `update` with what was drawn; `add` and `abort` at any time between.

    pool: the KV blocks. max_num_seqs: sequences that run at once. max_num_batched_tokens: tokens in one step.
    max_model_len: tokens in one sequence. eos_token_ids: end a sequence unless it ignores them.

    Raises ConfigError if a step could not hold one token of every running sequence.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        if not 0 < max_num_seqs <= max_num_batched_tokens:
            raise ConfigError(
                f"max_num_seqs {max_num_seqs} must be at least 1 and at most max_num_batched_tokens "
                f"{max_num_batched_tokens}.",
                "Raise max_num_batched_tokens or lower max_num_seqs.",
            )
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.num_preemptions = 0
        self._sequences: dict[str, Sequence] = {}
        self._num_arrived = 0

    @property
    def has_work(self) -> bool:
        """True while any sequence is neither finished, failed nor aborted."""
        return bool(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence.

        The API bounds what may wait. Raises InvalidRequest if it could never run here.
        """
        self._refuse_impossible(sequence)
        sequence.arrival = self._num_arrived
        self._num_arrived += 1
        self._sequences[sequence.request_id] = sequence
        self.waiting.append(sequence)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks now, also between `schedule` and `update`. Unknown ids are ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence, Status.ABORTED)

    def schedule(self) -> StepPlan:
        """Choose the next step's work, admitting and preempting as needed. Every chunk's blocks are in its table."""
        decodes = self._schedule_decodes()
        budget = self.max_num_batched_tokens - len(decodes)
        chunks = decodes
        for sequence in [sequence for sequence in self.running if sequence.num_uncomputed_tokens > 1]:
            if budget == 0:
                break
            chunks.append(_chunk(sequence, budget))
            budget -= chunks[-1].num_tokens
        while budget > 0 and self.waiting and len(self.running) < self.max_num_seqs:
            if not self._admit(self.waiting[0]):
                break
            chunks.append(_chunk(self.running[-1], budget))
            budget -= chunks[-1].num_tokens
        return StepPlan(tuple(chunks))

    def update(self, plan: StepPlan, drawn_token_ids: SequenceOf[int | None]) -> None:
        """Record that a plan was computed.

        drawn_token_ids: one for each of plan.sampled; None fails the sequence. A sequence that was aborted since
        `schedule` is skipped, whatever was drawn for it; a caller ends a failed prefill chunk by aborting it first.
        Afterwards each sequence's status and finish_reason say how it stands.
        """
        drawn = iter(drawn_token_ids)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            token_id = next(drawn) if chunk.samples else None
            if sequence.status is not Status.RUNNING:
                continue
            if chunk.samples and token_id is None:
                self._end(sequence, Status.FAILED)
                continue
            self._record_computed(sequence, chunk.num_tokens)
            if token_id is not None:
                self._record_drawn(sequence, token_id)

    def _refuse_impossible(self, sequence: Sequence) -> None:
        num_prompt, max_tokens = sequence.num_prompt_tokens, sequence.sampling.max_tokens
        num_drawn = len(sequence.output_token_ids)
        if sequence.request_id in self._sequences:
            raise InvalidRequest(f"request id {sequence.request_id!r} is in use; choose another")
        if num_prompt == 0 or max_tokens < 1:
            raise InvalidRequest(f"a prompt of {num_prompt} and max_tokens of {max_tokens}: each must be at least 1")
        if num_drawn >= max_tokens:
            raise InvalidRequest(f"{num_drawn} tokens were drawn elsewhere, but max_tokens is {max_tokens}")
        if num_prompt + max_tokens > self.max_model_len:
            raise InvalidRequest(
                f"{num_prompt} prompt tokens and max_tokens {max_tokens} exceed the context of {self.max_model_len} "
                "tokens; shorten the prompt or lower max_tokens",
                code="context_length_exceeded",
            )
        # The last token drawn is never fed back, so it needs no place in the KV cache.
        capacity = self.pool.num_blocks * self.pool.block_size
        if num_prompt + max_tokens - 1 > capacity:
            raise InvalidRequest(
                f"{num_prompt} prompt tokens and max_tokens {max_tokens} exceed the KV cache of {capacity} tokens; "
                "shorten the prompt, lower max_tokens or start the server with a larger KV cache",
                code="context_length_exceeded",
            )

    def _schedule_decodes(self) -> list[ScheduledChunk]:
        chunks: list[ScheduledChunk] = []
        for sequence in list(self.running):
            if sequence.status is not Status.RUNNING:
                break  # preempted for one before it, and so is every later one
            if sequence.num_uncomputed_tokens == 1 and self._grow(sequence):
                chunks.append(_chunk(sequence, 1))
        return chunks

    def _grow(self, sequence: Sequence) -> bool:
        """Give a decoding sequence the block of its next position. False if it was preempted itself."""
        if sequence.num_computed_tokens < len(sequence.block_table) * self.pool.block_size:
            return True
        while (block_ids := self.pool.allocate(1)) is None:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table += block_ids
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        self.running.remove(sequence)
        sequence.status = Status.WAITING
        sequence.num_preemptions += 1
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _admit(self, sequence: Sequence) -> bool:
        """Move the head of the queue to `running` with blocks for all its tokens, if there are enough."""
        block_size, num_tokens = self.pool.block_size, sequence.num_tokens
        chain_keys(sequence.block_keys, sequence.token_ids(0, num_tokens), block_size, sequence.salt)
        matched = self.pool.match_prefix(sequence.block_keys, num_tokens)
        num_missing = -(-num_tokens // block_size) - len(matched)
        spare = len(self.running)
        fresh = self.pool.allocate(num_missing) if num_missing + spare <= self.pool.num_free else None
        if fresh is None:
            self.pool.release(matched)
            return False
        sequence.block_table = matched + fresh
        sequence.num_computed_tokens = len(matched) * block_size
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
        self.pool.count_query(num_tokens, sequence.num_computed_tokens)
        sequence.status = Status.RUNNING
        self.running.append(self.waiting.popleft())
        return True

    def _record_computed(self, sequence: Sequence, num_tokens: int) -> None:
        """Count computed positions and register the blocks that they filled."""
        block_size = self.pool.block_size
        first_open = sequence.num_computed_tokens // block_size
        sequence.num_computed_tokens += num_tokens
        num_full = sequence.num_computed_tokens // block_size
        if num_full > len(sequence.block_keys):
            chain_keys(sequence.block_keys, sequence.token_ids(0, sequence.num_tokens), block_size, sequence.salt)
        for index in range(first_open, num_full):
            self.pool.register(sequence.block_table[index], sequence.block_keys[index])

    def _record_drawn(self, sequence: Sequence, token_id: int) -> None:
        sequence.output_token_ids.append(token_id)
        sampling = sequence.sampling
        is_eos = token_id in self.eos_token_ids and not sampling.ignore_eos
        if is_eos or token_id in sampling.stop_token_ids:
            sequence.finish_reason = "stop"
        elif len(sequence.output_token_ids) >= sampling.max_tokens:
            sequence.finish_reason = "length"
        if sequence.finish_reason is not None:
            self._end(sequence, Status.FINISHED)

    def _end(self, sequence: Sequence, status: Status) -> None:
        if sequence.status is Status.RUNNING:
            self._release(sequence)
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = status
        del self._sequences[sequence.request_id]

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = 0


def _chunk(sequence: Sequence, budget: int) -> ScheduledChunk:
    num_tokens = min(budget, sequence.num_uncomputed_tokens)
    samples = num_tokens == sequence.num_uncomputed_tokens
    return ScheduledChunk(sequence, sequence.num_computed_tokens, num_tokens, samples)
