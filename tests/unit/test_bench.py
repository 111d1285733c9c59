"""The parts of `barista bench` that need no server: when requests come, what they say, what a run's figures mean."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_openai import DONE, chunk, event, usage
from hypothesis import given, settings
from hypothesis import strategies as st

from barista.errors import ConfigError
from router.bench.arrivals import arrivals
from router.bench.client import ChatStream, RequestFailed, chat_body
from router.bench.load import Load, run
from router.bench.prompts import WORDS, prompt, words_for
from router.bench.record import Answer, Failure, Record
from router.bench.report import SLO_NAMES, Distribution, distribution, parse_slos, percentile, summarise
from router.sse import EventData

LAW = settings(max_examples=50, deadline=None)  # a busy machine breaks no law
SEEDS = st.integers(0, 2**32)
TIMES = st.floats(0, 1e4)
NO_LOAD = Load(rate=None, concurrency=None, duration=0.1, num_prompts=None, max_in_flight=100, seed=0)


def steady(
    start: float = 0.0, ttft: float = 1.0, tpot: float = 0.1, tokens: int = 11, per_chunk: int = 1, **fields: Any
) -> Answer:
    """Token i arrives at ttft + i * tpot, or with its chunk, whose last token it waits for; the first comes alone."""
    last = range(0, tokens + per_chunk - 1, per_chunk)
    chunks = tuple(start + ttft + tpot * min(i, tokens - 1) for i in last)
    whole = Answer(start=start, sent=start, chunks=chunks, end=chunks[-1], prompt_tokens=7, completion_tokens=tokens)
    return replace(whole, **fields)


def failure(kind: str = "http_503", start: float = 0.0, end: float = 1.0) -> Failure:
    return Failure(start=start, end=end, kind=kind, message=kind)


ANSWERS = st.builds(steady, start=TIMES, ttft=TIMES, tpot=TIMES, tokens=st.integers(1, 9), per_chunk=st.integers(1, 4))
RECORDS = st.lists(ANSWERS | st.builds(failure, kind=st.sampled_from(["timeout", "http_503"])), max_size=20)


# ---------------------------------------------------------------- arrivals


@LAW
@given(rate=st.floats(0.01, 100), duration=st.floats(0.01, 50), seed=SEEDS)
def test_arrivals_ascend_within_the_duration(rate: float, duration: float, seed: int) -> None:
    times = list(arrivals(rate, duration, seed))
    assert times == sorted(times)
    assert all(0 <= time < duration for time in times)


@LAW
@given(rate=st.floats(0.01, 100), shorter=st.floats(0.01, 50), longer=st.floats(0.01, 50), seed=SEEDS)
def test_a_longer_run_begins_as_a_shorter_one(rate: float, shorter: float, longer: float, seed: int) -> None:
    cut = [time for time in arrivals(rate, longer, seed) if time < shorter]
    assert cut == [time for time in arrivals(rate, shorter, seed) if time < longer]


@LAW
@given(rate=st.floats(1, 1000), seed=SEEDS)
def test_arrivals_have_the_rate_of_a_poisson_process(rate: float, seed: int) -> None:
    mean = 2500
    assert abs(len(list(arrivals(rate, mean / rate, seed))) - mean) < 8 * math.sqrt(mean)


def test_the_gaps_between_arrivals_are_exponential() -> None:
    times = list(arrivals(4.0, 5000.0, 1))
    gaps = np.diff(times)
    for multiple in (0.5, 1.0, 2.0):
        assert np.mean(gaps > multiple / 4.0) == pytest.approx(math.exp(-multiple), abs=0.02)


# ---------------------------------------------------------------- prompts


@LAW
@given(words=st.integers(1, 200), seed=SEEDS, index=st.integers(-1, 1000))
def test_a_prompt_has_its_words_and_is_a_function_of_its_number(words: int, seed: int, index: int) -> None:
    text = prompt(words, seed, index)
    assert text == prompt(words, seed, index)
    assert len(text.split(" ")) == words
    assert set(text.split(" ")) <= set(WORDS)


def test_prompts_of_a_run_differ() -> None:
    assert len({prompt(8, seed, index) for seed in range(10) for index in range(-1, 100)}) == 1010


@LAW
@given(tokens=st.integers(50, 5000), template=st.integers(0, 49))
def test_a_prompt_of_words_of_one_token_hits_the_length(tokens: int, template: int) -> None:
    def count(text: str) -> int:
        return template + len(text.split(" "))

    assert count(prompt(words_for(tokens, count), 5, 3)) == tokens


@LAW
@given(tokens=st.integers(100, 5000), per_word=st.integers(2, 9))
def test_a_prompt_of_longer_words_comes_as_close_as_words_do(tokens: int, per_word: int) -> None:
    words = words_for(tokens, lambda text: 20 + per_word * len(text.split(" ")))
    assert abs(20 + per_word * words - tokens) <= per_word / 2


@pytest.mark.parametrize("count", [lambda text: None, lambda text: 3])
def test_without_a_tokenizer_a_word_is_taken_for_a_token(count: Any) -> None:
    assert words_for(128, count) == 128


def test_a_length_below_the_template_names_the_least() -> None:
    with pytest.raises(ConfigError, match=r"--input-len 8 .*--input-len 31"):
        words_for(8, lambda text: 30 + len(text.split(" ")))


# ---------------------------------------------------------------- one answer


@LAW
@given(tokens=st.integers(2, 50), per_chunk=st.integers(1, 7), ttft=st.floats(0.01, 10), tpot=st.floats(0.001, 1))
def test_tpot_does_not_depend_on_how_many_tokens_share_a_chunk(
    tokens: int, per_chunk: int, ttft: float, tpot: float
) -> None:
    answer = steady(ttft=ttft, tpot=tpot, tokens=tokens, per_chunk=per_chunk)
    assert answer.ttft == pytest.approx(ttft)
    assert answer.tpot == pytest.approx(tpot)
    assert sum(answer.itl) == pytest.approx(tpot * (tokens - 1))
    assert len(answer.itl) == math.ceil((tokens - 1) / per_chunk)


def test_latency_counts_from_the_arrival_however_late_the_request_was_sent() -> None:
    answer = steady(start=10.0, ttft=3.0, sent=12.0)
    assert (answer.ttft, answer.e2el) == (pytest.approx(3.0), pytest.approx(4.0))


def test_one_token_has_no_time_per_further_token() -> None:
    assert steady(tokens=1).tpot is None
    assert steady(tokens=1).itl == []


def test_without_usage_chunks_are_counted() -> None:
    assert steady(tokens=11, per_chunk=5, completion_tokens=None).output_tokens == 3


# ---------------------------------------------------------------- a run


def test_the_figures_of_a_run_in_closed_form() -> None:
    answers = [steady(start=float(i), ttft=1.0 + i, tpot=0.1, tokens=11) for i in range(5)]
    summary = summarise([*answers, failure("timeout", 0.0, 10.0)], {"ttft": 3500.0, "tpot": 200.0})
    assert (summary.completed, summary.failed, summary.failures) == (5, 1, {"timeout": 1})
    assert summary.duration == pytest.approx(10.0)
    assert summary.request_throughput == pytest.approx(0.5)
    assert summary.output_throughput == pytest.approx(5.5)
    assert (summary.total_input_tokens, summary.total_output_tokens, summary.counted_by) == (35, 55, "usage")
    assert summary.request_goodput == pytest.approx(0.3)
    assert summary.goodput_share == pytest.approx(3 / 6)
    assert summary.ttft_ms == Distribution(*map(pytest.approx, (3000.0, 3000.0, 4600.0, 4960.0, 5000.0)))
    assert summary.e2el_ms == Distribution(*map(pytest.approx, (4000.0, 4000.0, 5600.0, 5960.0, 6000.0)))
    assert summary.tpot_ms == Distribution(*[pytest.approx(100.0)] * 5)
    assert summary.itl_ms == Distribution(*[pytest.approx(100.0)] * 5)
    assert summary.lag_ms == Distribution(0.0, 0.0, 0.0, 0.0, 0.0)


@LAW
@given(records=RECORDS, seed=SEEDS)
def test_a_summary_does_not_depend_on_the_order_of_the_records(records: list[Record], seed: int) -> None:
    shuffled = random.Random(seed).sample(records, len(records))
    assert summarise(shuffled, {"ttft": 1e6}) == summarise(records, {"ttft": 1e6})


@LAW
@given(records=RECORDS)
def test_failures_add_to_no_latency(records: list[Record]) -> None:
    answers = [record for record in records if isinstance(record, Answer)]
    whole, part = summarise(records, {}), summarise(answers, {})
    assert (whole.ttft_ms, whole.tpot_ms, whole.itl_ms) == (part.ttft_ms, part.tpot_ms, part.itl_ms)
    assert whole.completed + whole.failed == len(records)
    assert sum(whole.failures.values()) == whole.failed


@LAW
@given(records=RECORDS, limits=st.tuples(st.floats(1, 1e7), st.floats(1, 1e7)), name=st.sampled_from(SLO_NAMES))
def test_a_looser_objective_never_lowers_goodput(records: list[Record], limits: tuple[float, float], name: str) -> None:
    tight, loose = sorted(limits)
    strict, lax = summarise(records, {name: tight}), summarise(records, {name: loose})
    assert 0 <= strict.goodput_share <= lax.goodput_share <= 1
    assert lax.request_goodput <= lax.request_throughput


def test_a_run_without_answers_has_no_latencies() -> None:
    for records in ([], [failure()]):
        summary = summarise(records, {"ttft": 1.0})
        assert summary.completed == summary.request_goodput == summary.goodput_share == 0
        assert summary.ttft_ms is summary.itl_ms is summary.chunk_tokens is summary.total_input_tokens is None


@pytest.mark.parametrize(("counted", "expected"), [((4, 4), "usage"), ((None, None), "chunks"), ((4, None), "both")])
def test_a_summary_says_who_counted_the_tokens(counted: tuple[int | None, ...], expected: str) -> None:
    assert summarise([steady(completion_tokens=count) for count in counted], {}).counted_by == expected


@LAW
@given(values=st.lists(st.floats(-1e9, 1e9), min_size=1), q=st.floats(0, 100))
def test_percentiles_are_those_of_numpy(values: list[float], q: float) -> None:
    assert percentile(sorted(values), q) == pytest.approx(np.percentile(values, q), rel=1e-9, abs=1e-3)


def test_a_distribution_is_in_milliseconds() -> None:
    hundred = distribution(i / 1000 for i in range(101))
    assert hundred == Distribution(*map(pytest.approx, (50.0, 50.0, 90.0, 99.0, 100.0)))
    assert distribution([]) is None


def test_objectives_are_read_by_name() -> None:
    assert parse_slos(["ttft:500", "e2el:1e3"]) == {"ttft": 500.0, "e2el": 1000.0}
    assert parse_slos([]) == {}


@pytest.mark.parametrize("text", ["", "ttft", "ttft:", "ttft:x", "ttft:-1", "ttft:nan", "ttft:inf", "itl:5", ":5"])
def test_an_objective_that_is_none_is_named_with_a_remedy(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--goodput {text} .*--goodput ttft:500"):
        parse_slos(["tpot:50", text])


# ---------------------------------------------------------------- a stream


@LAW
@given(cuts=st.lists(st.integers(0, 80), max_size=6))
def test_events_are_the_same_however_their_bytes_are_cut(cuts: list[int]) -> None:
    data = ": hello\n\ndata: a\u2028b\r\n\ndata:{}\n\nid: 3\ndata: ☕\n\ndata: half".encode()
    edges = [0, *sorted(cuts), len(data)]
    events = EventData()
    assert [e for a, b in itertools.pairwise(edges) for e in events.feed(data[a:b])] == ["a\u2028b", "{}", "☕"]


def follow(*pieces: bytes) -> Answer:
    """The pieces arrive at 1, 2, 3, ..."""
    stream = ChatStream()
    for now, piece in enumerate(pieces, 1):
        stream.feed(piece, float(now))
    return stream.answer(0.0, 0.5)


def test_a_chunk_counts_from_its_text_on_and_a_stream_to_its_done() -> None:
    role, text, thought = chunk(role="assistant", content=""), chunk(content="a"), chunk(reasoning_content="b")
    answer = follow(role, thought, text + text, usage(5, 3), DONE, b"")
    assert answer == Answer(
        start=0.0, sent=0.5, chunks=(2.0, 3.0, 3.0), end=5.0, prompt_tokens=5, completion_tokens=3
    )  # fmt: skip


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ([], "bad_answer"),
        ([b'{"choices": []}'], "bad_answer"),
        ([event([1])], "bad_answer"),
        ([event({"id": 1})], "bad_answer"),
        ([b"data: {\n\n"], "bad_answer"),
        ([b"data: \xff\n\n"], "bad_answer"),
        ([chunk(content="a")], "broken_stream"),
        ([chunk(role="assistant"), DONE], "empty"),
        ([chunk(content="a"), event({"error": {"message": "lost"}}), DONE], "error_event"),
        ([event({"error": "lost"})], "error_event"),
    ],
)
def test_a_stream_that_is_no_answer_has_a_kind(pieces: Sequence[bytes], kind: str) -> None:
    with pytest.raises(RequestFailed) as caught:
        follow(*pieces)
    assert caught.value.kind == kind


def test_what_a_server_may_not_know_can_be_left_out() -> None:
    assert chat_body("m", 5, ["ignore_eos", "stream_options", "temperature"]) == {
        "model": "m", "stream": True, "max_tokens": 5
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"--omit messages .*ignore_eos"):
        chat_body("m", 5, ["messages"])


# ---------------------------------------------------------------- loads


class Asked:
    """Answers after `seconds`, or refuses; knows who was there at the same time."""

    def __init__(self, seconds: float, answers: bool = True) -> None:
        self.seconds, self.answers = seconds, answers
        self.starts: list[tuple[int, float]] = []
        self.now = self.most = 0

    async def __call__(self, index: int, start: float) -> bool:
        self.starts.append((index, start))
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.seconds)
        self.now -= 1
        return self.answers


def test_an_open_loop_keeps_its_schedule_while_the_server_is_slow() -> None:
    asked = Asked(0.2)
    began = time.perf_counter()
    asyncio.run(run(replace(NO_LOAD, rate=100.0, seed=3), asked))
    starts = [start for _, start in asked.starts]
    offsets = np.subtract(starts, list(arrivals(100.0, 0.1, 3)))
    assert np.ptp(offsets) < 1e-6
    assert 0 <= offsets[0] - began < 5
    assert asked.most > 1
    assert asked.now == 0


def test_what_waits_for_its_turn_keeps_its_arrival() -> None:
    asked = Asked(0.03)
    asyncio.run(run(replace(NO_LOAD, rate=100.0, seed=3, max_in_flight=2, num_prompts=6), asked))
    assert asked.most == 2
    assert [index for index, _ in asked.starts] == list(range(6))
    assert asked.starts[5][1] - asked.starts[0][1] < 0.1


def test_a_closed_loop_has_a_number_of_users() -> None:
    asked = Asked(0.02)
    asyncio.run(run(replace(NO_LOAD, concurrency=3), asked))
    assert asked.most == 3
    assert 3 <= len(asked.starts) <= 3 * 6
    assert sorted(index for index, _ in asked.starts) == list(range(len(asked.starts)))


@pytest.mark.parametrize("load", [{"concurrency": 3}, {"rate": 1000.0}])
def test_a_load_ends_with_its_number_of_prompts(load: dict[str, Any]) -> None:
    asked = Asked(0.0)
    asyncio.run(run(replace(NO_LOAD, duration=5.0, num_prompts=7, **load), asked))
    assert [index for index, _ in asked.starts] == list(range(7))


def test_a_closed_loop_does_not_hammer_a_server_that_fails() -> None:
    asked = Asked(0.0, answers=False)
    asyncio.run(run(NO_LOAD, asked))
    assert len(asked.starts) <= 2
