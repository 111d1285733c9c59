"""The scheduler's policy, one rule at a time. The laws that hold in every schedule are in test_scheduler_laws."""

import pytest

from barista.errors import ConfigError, InvalidRequest
from router.kv_cache.blocks import BlockPool
from router.messages import SamplingParams
from router.request import Sequence, Status
from router.scheduler import Scheduler, StepPlan


def make_scheduler(num_blocks: int = 64, block_size: int = 2, **limits: int) -> Scheduler:
    defaults = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 8,
        "max_model_len": 64,
    }
    return Scheduler(BlockPool(num_blocks, block_size), **(defaults | limits), eos_token_ids=(99,))


def make_sequence(request_id: str, num_prompt: int, max_tokens: int = 16, **sampling) -> Sequence:
    """A sequence whose prompt no other request id shares."""
    prompt = tuple(1000 * ord(request_id) + index for index in range(num_prompt))
    return Sequence(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
    )


def shape(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.request_id, chunk.start, chunk.num_tokens) for chunk in plan.chunks]


def step(scheduler: Scheduler, token_id: int = 7) -> list[tuple[str, int, int]]:
    """One step in which every sampling row draws `token_id`."""
    plan = scheduler.schedule()
    scheduler.update(plan, [token_id] * len(plan.sampled))
    return shape(plan)


def test_decodes_come_first_and_prefill_takes_what_is_left_of_the_budget():
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", 3))
    assert step(scheduler) == [("a", 0, 3)]
    scheduler.add(make_sequence("b", 10))
    scheduler.add(make_sequence("c", 2))
    assert step(scheduler) == [("a", 3, 1), ("b", 0, 7)]
    assert step(scheduler) == [("a", 4, 1), ("b", 7, 3), ("c", 0, 2)]
    assert step(scheduler) == [("a", 5, 1), ("b", 10, 1), ("c", 2, 1)]


def test_a_sequence_samples_only_when_its_prompt_is_complete():
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", 12))
    plan = scheduler.schedule()
    assert plan.sampled == []
    assert plan.chunks[0].token_ids == list(plan.chunks[0].sequence.prompt_token_ids[:8])
    scheduler.update(plan, [])
    assert [sequence.request_id for sequence in scheduler.schedule().sampled] == ["a"]


def test_a_waiting_head_is_not_overtaken_by_one_that_would_fit():
    scheduler = make_scheduler(num_blocks=8)
    scheduler.add(make_sequence("a", 8, max_tokens=2))
    step(scheduler)
    scheduler.add(make_sequence("b", 12, max_tokens=2))
    scheduler.add(make_sequence("c", 1, max_tokens=2))
    assert step(scheduler) == [("a", 8, 1)]
    assert step(scheduler) == [("b", 0, 8)]


def test_the_latest_arrived_is_preempted_and_resumes_with_its_tokens():
    scheduler = make_scheduler(num_blocks=6)
    first, second = make_sequence("a", 4, max_tokens=5), make_sequence("b", 4, max_tokens=8)
    scheduler.add(first)
    scheduler.add(second)
    while scheduler.num_preemptions == 0:
        step(scheduler)
    assert scheduler.running == [first]
    assert list(scheduler.waiting) == [second]
    assert second.block_table == []
    drawn = list(second.output_token_ids)
    assert drawn
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.pool.hits > 0
    assert second.output_token_ids[: len(drawn)] == drawn
    assert second.num_cached_tokens == 0, "its own blocks, found again, are not reported as cached"
    assert [len(sequence.output_token_ids) for sequence in (first, second)] == [5, 8]


def test_admission_leaves_a_spare_block_for_each_running_sequence():
    scheduler = make_scheduler(num_blocks=5)
    scheduler.add(make_sequence("a", 5, max_tokens=2))
    scheduler.add(make_sequence("b", 4, max_tokens=2))
    assert step(scheduler) == [("a", 0, 5)]
    assert scheduler.pool.num_free == 2


def test_a_cached_prefix_is_not_computed_again_and_is_reported():
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", 5, max_tokens=1))
    step(scheduler)
    again = make_sequence("a", 5, max_tokens=1)
    scheduler.add(again)
    assert step(scheduler) == [("a", 4, 1)]
    assert again.num_cached_tokens == 4
    assert (scheduler.pool.queries, scheduler.pool.hits) == (10, 4)


def test_blocks_completed_in_decode_are_shared_with_a_continuation():
    scheduler = make_scheduler()
    first = make_sequence("a", 3, max_tokens=4)
    scheduler.add(first)
    while scheduler.has_work:
        step(scheduler)
    prompt = (*first.prompt_token_ids, *first.output_token_ids, 5)
    scheduler.add(Sequence(request_id="b", prompt_token_ids=prompt, sampling=SamplingParams()))
    assert step(scheduler) == [("b", 6, 2)]  # 3 + 4 - 1 positions were computed: three full blocks


def test_a_block_is_shared_only_once_it_is_computed():
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", 13))
    step(scheduler)
    assert scheduler.pool.num_cached == 8 // 2


def test_a_queued_request_that_waits_does_not_count_as_cache_queries():
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_sequence("a", 4))
    scheduler.add(make_sequence("b", 4))
    step(scheduler)
    step(scheduler)
    assert scheduler.pool.queries == 4


@pytest.mark.parametrize("in_flight", [False, True])
def test_an_abort_frees_the_blocks_within_the_call(in_flight):
    scheduler = make_scheduler()
    sequence = make_sequence("a", 5)
    scheduler.add(sequence)
    plan = scheduler.schedule()
    if not in_flight:
        scheduler.update(plan, [7])
    scheduler.abort("a")
    assert scheduler.pool.num_used == 0
    assert sequence.status is Status.ABORTED
    assert not scheduler.has_work
    if in_flight:
        scheduler.update(plan, [7])
        assert sequence.output_token_ids == []
        assert scheduler.pool.num_cached == 0, "what an aborted row computed is not shared"


def test_an_abort_removes_a_waiting_request_and_ignores_an_unknown_one():
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_sequence("a", 2))
    scheduler.add(make_sequence("b", 2))
    step(scheduler)
    scheduler.abort("b")
    scheduler.abort("nobody")
    assert not scheduler.waiting
    assert scheduler.has_work


def test_a_failed_row_ends_its_own_sequence_only_and_shares_nothing():
    scheduler = make_scheduler()
    broken, healthy = make_sequence("a", 4), make_sequence("b", 4)
    scheduler.add(broken)
    scheduler.add(healthy)
    plan = scheduler.schedule()
    scheduler.update(plan, [None, 7])
    assert (broken.status, broken.output_token_ids, broken.block_table) == (Status.FAILED, [], [])
    assert (healthy.status, healthy.output_token_ids) == (Status.RUNNING, [7])
    assert scheduler.pool.num_cached == 2


@pytest.mark.parametrize(
    ("sampling", "token_id", "reason", "num_outputs"),
    [
        ({}, 99, "stop", 1),
        ({"ignore_eos": True}, 99, "length", 3),
        ({"stop_token_ids": (42,)}, 42, "stop", 1),
        ({"stop_token_ids": (42,), "ignore_eos": True}, 42, "stop", 1),
        ({}, 7, "length", 3),
    ],
)
def test_why_a_sequence_finishes(sampling, token_id, reason, num_outputs):
    scheduler = make_scheduler()
    sequence = make_sequence("a", 4, max_tokens=3, **sampling)
    scheduler.add(sequence)
    while scheduler.has_work:
        step(scheduler, token_id)
    assert sequence.status is Status.FINISHED
    assert sequence.finish_reason == reason
    assert sequence.output_token_ids == [token_id] * num_outputs
    assert scheduler.pool.num_used == 0


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "message"),
    [
        (60, 5, "60 prompt tokens and max_tokens 5 exceed the context of 64"),
        (16, 6, "16 prompt tokens and max_tokens 6 exceed the KV cache of 20"),
        (0, 1, "a prompt of 0"),
        (1, 0, "max_tokens of 0"),
    ],
)
def test_a_request_that_could_never_run_is_refused_with_the_numbers(num_prompt, max_tokens, message):
    scheduler = make_scheduler(num_blocks=10)
    with pytest.raises(InvalidRequest, match=message):
        scheduler.add(make_sequence("a", num_prompt, max_tokens))
    assert not scheduler.has_work


def test_a_request_that_just_fits_the_cache_finishes():
    scheduler = make_scheduler(num_blocks=10)
    sequence = make_sequence("a", 16, max_tokens=5)
    scheduler.add(sequence)
    while scheduler.has_work:
        assert step(scheduler)
    assert len(sequence.output_token_ids) == 5


def test_a_request_id_in_use_is_refused():
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", 1))
    with pytest.raises(InvalidRequest, match="'a' is in use"):
        scheduler.add(make_sequence("a", 1))


def test_a_budget_below_the_number_of_sequences_is_refused():
    with pytest.raises(ConfigError, match="max_num_seqs 5"):
        make_scheduler(max_num_seqs=5, max_num_batched_tokens=4)


def test_nothing_to_do_is_an_empty_plan():
    assert make_scheduler().schedule().chunks == ()
