"""Laws of the scheduler over random schedules, checked by a simulated model that reads every position's KV.

The model's next token is a hash of the whole prefix and its KV entry for a position *is* the prefix up to there, so a
position computed under a wrong prefix, read from a wrong block or overwritten too early cannot go unnoticed.
"""

from dataclasses import dataclass
from zlib import crc32

from hypothesis import given, settings
from hypothesis import strategies as st

from router.kv_cache.blocks import BlockPool
from router.messages import SamplingParams
from router.request import Sequence, Status
from router.scheduler import Scheduler, StepPlan

VOCAB_SIZE = 5
EOS = 4


def next_token(token_ids: list[int]) -> int:
    return crc32(bytes(token_ids)) % VOCAB_SIZE


def answer_alone(prompt: list[int], max_tokens: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(max_tokens):
        token_ids.append(next_token(token_ids))
        if token_ids[-1] == EOS:
            break
    return token_ids[len(prompt) :]


class SimulatedModel:
    """KV: (block, offset) -> (salt, the token ids up to and including that position)."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.kv: dict[tuple[int, int], tuple[bytes, tuple[int, ...]]] = {}

    def compute(self, plan: StepPlan) -> list[int]:
        # Every layer of a real step writes all its rows before any row attends.
        for chunk in plan.chunks:
            for position, token_id in enumerate(chunk.token_ids, chunk.start):
                prefix = (*chunk.sequence.token_ids(0, position), token_id)
                self.kv[self.slot(chunk.sequence, position)] = (chunk.sequence.salt, prefix)
        for chunk in plan.chunks:
            self.attend(chunk.sequence, chunk.start + chunk.num_tokens)
        return [next_token(sequence.token_ids(0, sequence.num_tokens)) for sequence in plan.sampled]

    def slot(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.block_table[position // self.block_size], position % self.block_size

    def attend(self, sequence: Sequence, stop: int) -> None:
        token_ids = tuple(sequence.token_ids(0, stop))
        for position in range(stop):
            assert self.kv[self.slot(sequence, position)] == (sequence.salt, token_ids[: position + 1])


@dataclass
class Request:
    prompt: list[int]
    max_tokens: int
    salt: bytes
    arrives: int
    aborts_after: int | None
    aborts_in_flight: bool

    def aborts_in(self, step: int, in_flight: bool) -> bool:
        """in_flight: while the step is being computed, rather than before it is planned."""
        return self.aborts_after is not None and (step, in_flight) == (
            self.arrives + self.aborts_after,
            self.aborts_in_flight,
        )


requests = st.builds(
    Request,
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14),
    max_tokens=st.integers(1, 8),
    salt=st.sampled_from([b"", b"", b"a"]),
    arrives=st.integers(0, 12),
    aborts_after=st.one_of(st.none(), st.none(), st.integers(0, 15)),
    aborts_in_flight=st.booleans(),
)


@st.composite
def schedulers(draw: st.DrawFn) -> Scheduler:
    block_size = draw(st.integers(1, 4))
    least_blocks = -(-21 // block_size)  # the longest request computes 14 + 8 - 1 positions
    max_num_seqs = draw(st.integers(1, 4))
    return Scheduler(
        BlockPool(least_blocks + draw(st.integers(0, 12)), block_size),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.integers(0, 12)),
        max_model_len=22,
        eos_token_ids=(EOS,),
    )


def check_plan(scheduler: Scheduler, plan: StepPlan, alive: list[Sequence]) -> None:
    assert plan.num_tokens <= scheduler.max_num_batched_tokens
    assert len({id(chunk.sequence) for chunk in plan.chunks}) == len(plan.chunks)
    assert len(scheduler.running) <= scheduler.max_num_seqs
    for chunk in plan.chunks:
        assert chunk.num_tokens > 0
        assert chunk.start == chunk.sequence.num_computed_tokens, "positions are computed without gaps"
        assert chunk.start + chunk.num_tokens <= len(chunk.sequence.block_table) * scheduler.pool.block_size
        assert chunk.samples == (chunk.start + chunk.num_tokens == chunk.sequence.num_tokens)
    if alive:
        oldest = min(alive, key=lambda sequence: sequence.arrival)
        assert oldest in [chunk.sequence for chunk in plan.chunks], "the oldest request progresses in every step"
    arrivals = [sequence.arrival for sequence in [*scheduler.running, *scheduler.waiting]]
    assert arrivals == sorted(arrivals), "nobody overtakes"


def check_blocks(scheduler: Scheduler) -> None:
    scheduler.pool.check([sequence.block_table for sequence in scheduler.running])
    assert not any(sequence.block_table or sequence.num_computed_tokens for sequence in scheduler.waiting)


def abort(scheduler: Scheduler, sequence: Sequence) -> None:
    ended = sequence.status in (Status.FINISHED, Status.ABORTED)
    scheduler.abort(sequence.request_id)
    assert ended or sequence.status is Status.ABORTED
    assert sequence.block_table == []
    check_blocks(scheduler)


def run(scheduler: Scheduler, asked: list[Request]) -> list[Sequence]:
    """Drive all requests to their end, checking every law on the way."""
    model = SimulatedModel(scheduler.pool.block_size)
    sequences = [
        Sequence(
            request_id=str(index),
            prompt_token_ids=tuple(request.prompt),
            sampling=SamplingParams(max_tokens=request.max_tokens),
            salt=request.salt,
        )
        for index, request in enumerate(asked)
    ]
    step = 0
    while scheduler.has_work or any(request.arrives >= step for request in asked):
        for request, sequence in zip(asked, sequences, strict=True):
            if request.arrives == step:
                scheduler.add(sequence)
            if request.aborts_in(step, in_flight=False):
                abort(scheduler, sequence)
        alive = [*scheduler.running, *scheduler.waiting]
        plan = scheduler.schedule()
        check_plan(scheduler, plan, alive)
        check_blocks(scheduler)
        drawn = model.compute(plan)
        for request, sequence in zip(asked, sequences, strict=True):
            if request.aborts_in(step, in_flight=True):
                abort(scheduler, sequence)
        scheduler.update(plan, drawn)
        check_blocks(scheduler)
        step += 1
        assert step < 1000, "every request ends"
    return sequences


@settings(max_examples=150, deadline=None)
@given(schedulers(), st.lists(requests, min_size=1, max_size=8))
def test_every_answer_is_the_one_given_alone_whatever_the_schedule(scheduler, asked):
    for request, sequence in zip(asked, run(scheduler, asked), strict=True):
        alone = answer_alone(request.prompt, request.max_tokens)
        if sequence.status is Status.ABORTED:
            assert sequence.output_token_ids == alone[: len(sequence.output_token_ids)]
            continue
        assert sequence.status is Status.FINISHED
        assert sequence.output_token_ids == alone
        assert sequence.finish_reason == ("stop" if alone[-1] == EOS else "length")
    assert scheduler.pool.num_used == 0


def test_answers_survive_preemption_and_prefix_hits():
    """The law above on a schedule that is known to preempt and to share."""
    scheduler = Scheduler(
        BlockPool(8, 2),
        max_num_seqs=4,
        max_num_batched_tokens=6,
        max_model_len=16,
    )
    asked = [Request([0, 1, 0, index % 2], 9, b"", index, None, False) for index in range(6)]
    sequences = run(scheduler, asked)
    for request, sequence in zip(asked, sequences, strict=True):
        token_ids = list(request.prompt)
        for _ in range(request.max_tokens):
            token_ids.append(next_token(token_ids))
        assert sequence.output_token_ids == token_ids[4:]
    assert scheduler.num_preemptions > 0
    assert scheduler.pool.hits > 0
