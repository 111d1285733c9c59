"""What is drawn: closed forms, a plain reference for each filter and penalty, and rows that ignore their neighbours."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.messages import SamplingParams
from router.request import Sequence
from router.sampler import Drawn, philox_uniform, sample

VOCAB_SIZE = 300


def random_logits(num_rows: int, vocab_size: int = VOCAB_SIZE, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def make_sequence(sampling: SamplingParams, prompt=(1, 2, 3), outputs=()) -> Sequence:
    return Sequence(request_id="r", prompt_token_ids=tuple(prompt), sampling=sampling, output_token_ids=list(outputs))


def draw(logits: torch.Tensor, prompt=(1, 2, 3), outputs=(), **sampling) -> Drawn:
    """One row alone."""
    (drawn,) = sample(logits.reshape(1, -1), [make_sequence(SamplingParams(**sampling), prompt, outputs)])
    assert drawn is not None
    return drawn


def draw_many(logits: torch.Tensor, count: int, **sampling) -> np.ndarray:
    """The token ids that `count` seeds draw from one row of logits: [count]."""
    rows = logits.reshape(1, -1).expand(count, -1)
    drawn = sample(rows, [make_sequence(SamplingParams(seed=seed, **sampling)) for seed in range(count)])
    return np.array([row.token_id for row in drawn if row is not None])


def softmax(logits: torch.Tensor) -> np.ndarray:
    return torch.softmax(logits.double(), dim=-1).numpy()


samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.9, 0.2]),
    top_k=st.sampled_from([0, 1, 5, 1000]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    seed=st.integers(-(2**63), 2**64),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.floats(-100, 100), max_size=2),
    logprobs=st.sampled_from([None, 0, 4]),
)
sequences = st.builds(
    make_sequence,
    samplings,
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=6),
    st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(sequences, min_size=1, max_size=6), st.integers(0, 1000))
def test_a_row_draws_in_a_batch_what_it_draws_alone_to_the_byte(batch, seed):
    logits = random_logits(len(batch), seed=seed)
    before = logits.clone()
    together = sample(logits, batch)
    assert together == [sample(logits[index].clone()[None], [row])[0] for index, row in enumerate(batch)]
    assert torch.equal(logits, before)


def test_greedy_takes_the_lowest_id_of_equal_maxima():
    logits = torch.zeros(2, 50)
    logits[0, [7, 30]] = 5.0
    greedy = make_sequence(SamplingParams(temperature=0))
    assert sample(logits, [greedy, greedy]) == [Drawn(7), Drawn(0)]


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-4}])
def test_the_narrowest_filter_and_the_coldest_temperature_are_greedy(filters):
    logits = random_logits(1)[0]
    assert set(draw_many(logits, 50, **filters)) == {int(logits.argmax())}


def test_top_k_1_is_greedy_among_logits_whose_weights_round_alike():
    logits = torch.zeros(10)
    logits[4] = 1e-9
    assert set(draw_many(logits, 20, top_k=1)) == {4}


@pytest.mark.parametrize("temperature", [1e-300, 1e-30])
def test_a_vanishing_temperature_is_greedy_and_finite(temperature):
    logits = random_logits(1)[0]
    assert draw(logits, temperature=temperature).token_id == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    logits = random_logits(1, vocab_size=8, scale=1.0)[0]
    count = 4000
    observed = np.bincount(draw_many(logits, count, temperature=temperature), minlength=8)
    expected = softmax(logits / temperature) * count
    assert ((observed - expected) ** 2 / expected).sum() < 24.3  # chi-square, 7 degrees of freedom, p = 0.001


def test_draws_of_one_seed_over_token_indices_follow_the_softmax():
    logits = random_logits(1, vocab_size=8, scale=1.0)[0]
    count = 2000
    rows = [make_sequence(SamplingParams(seed=5), outputs=[0] * index) for index in range(count)]
    observed = np.bincount([row.token_id for row in sample(logits.expand(count, -1), rows)], minlength=8)
    expected = softmax(logits) * count
    assert ((observed - expected) ** 2 / expected).sum() < 24.3


def test_a_seed_and_an_index_fix_the_draw():
    logits = random_logits(1, scale=0.1)[0]
    first = [draw(logits, seed=1, outputs=[0] * index).token_id for index in range(6)]
    assert first == [draw(logits, seed=1, outputs=[9] * index).token_id for index in range(6)]
    assert first != [draw(logits, seed=2, outputs=[0] * index).token_id for index in range(6)]
    assert len(set(first)) > 1


@pytest.mark.parametrize("top_p", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("scale", [0.05, 2.0])
def test_top_p_keeps_the_smallest_set_with_its_mass(top_p, scale):
    logits = random_logits(1, vocab_size=3000, scale=scale)[0]
    probs = softmax(logits)
    order = np.argsort(-probs, kind="stable")
    size = int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1
    drawn = draw_many(logits, 400, top_p=top_p)
    assert set(drawn) <= set(order[:size])
    # The draw walks the kept tokens best first, so the uniforms say exactly which token each seed must give.
    mass = np.cumsum(probs[order[:size]])
    uniforms = np.array([philox_uniform(seed, 0) for seed in range(400)])
    expected = order[np.searchsorted(mass, uniforms * mass[-1], side="right")]
    assert (drawn == expected).mean() > 0.98  # float32 weights may move a boundary


def test_top_k_and_min_p_keep_what_they_say():
    logits = torch.log(torch.tensor([0.02, 0.4, 0.08, 0.2, 0.3]))
    assert set(draw_many(logits, 300, top_k=2)) == {1, 4}
    assert set(draw_many(logits, 300, min_p=0.45)) == {1, 3, 4}
    assert set(draw_many(logits, 300, top_k=3, top_p=0.5)) == {1, 4}, "top_p is of the mass that top_k left"
    assert set(draw_many(logits, 300, min_p=0.45, temperature=4.0)) == {0, 1, 2, 3, 4}, "min_p follows the temperature"


def test_top_k_keeps_the_lowest_ids_among_equals():
    assert set(draw_many(torch.zeros(40), 200, top_k=3)) == {0, 1, 2}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 19), min_size=1, max_size=8),
    st.lists(st.integers(0, 19), max_size=8),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.floats(0.5, 2),
    st.integers(0, 1000),
)
def test_penalties_equal_the_plain_reference(prompt, outputs, presence, frequency, repetition, seed):
    logits = random_logits(1, vocab_size=20, seed=seed)[0]
    expected = logits.double().numpy().copy()
    for token_id in set(prompt) | set(outputs):
        expected[token_id] *= 1 / repetition if expected[token_id] > 0 else repetition
    for token_id in set(outputs):
        expected[token_id] -= presence + frequency * outputs.count(token_id)
    expected[3] += 1.25
    penalties = {"presence_penalty": presence, "frequency_penalty": frequency, "repetition_penalty": repetition}
    drawn = draw(logits, prompt, outputs, temperature=0, logit_bias={3: 1.25}, **penalties)
    assert expected[drawn.token_id] == pytest.approx(expected.max(), abs=1e-5)


def test_the_frequency_penalty_counts_and_the_presence_penalty_does_not():
    logits = torch.tensor([0.0, 2.5, 2.0, 0.0])
    assert draw(logits, outputs=[1, 1, 2], temperature=0, frequency_penalty=1.0).token_id == 2
    assert draw(logits, outputs=[1, 1, 2], temperature=0, presence_penalty=1.0).token_id == 1


def test_logit_bias_bans_and_forces():
    logits = random_logits(1)[0]
    best = int(logits.argmax())
    assert draw(logits, temperature=0, logit_bias={best: -100.0}).token_id == int(logits.argsort()[-2])
    assert draw(logits, seed=3, logit_bias={17: 100.0}).token_id == 17


def test_logprobs_are_of_the_raw_logits_best_first():
    logits = random_logits(1)[0]
    drawn = draw(logits, temperature=2.0, top_k=9, logit_bias={5: 100.0}, logprobs=4)
    expected = torch.log_softmax(logits, dim=-1)
    assert drawn.token_id == 5
    assert drawn.logprob == pytest.approx(float(expected[5]), abs=1e-5)
    assert [token for token, _ in drawn.top_logprobs] == expected.topk(4).indices.tolist()
    assert [logprob for _, logprob in drawn.top_logprobs] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-5)


def test_alternatives_with_many_ties_are_ordered_by_logprob_then_id():
    logits = random_logits(1, scale=1.0)[0].round()
    drawn = draw(logits, temperature=0, logprobs=100)
    assert [token for token, _ in drawn.top_logprobs] == np.lexsort((np.arange(VOCAB_SIZE), -logits))[:100].tolist()


def test_equal_logprobs_are_listed_by_id_and_zero_alternatives_give_the_drawn_one_alone():
    drawn = draw(torch.zeros(64), temperature=0, logprobs=3)
    assert [token for token, _ in drawn.top_logprobs] == [0, 1, 2]
    none_asked = draw(torch.zeros(64), temperature=0, logprobs=0)
    assert none_asked.logprob == pytest.approx(-np.log(64))
    assert none_asked.top_logprobs == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_is_not_finite_fails_its_row_alone(value, temperature):
    logits = random_logits(3)
    rows = [make_sequence(SamplingParams(temperature=temperature, seed=seed)) for seed in range(3)]
    healthy = sample(logits, rows)
    logits[1, 20] = value
    assert sample(logits, rows) == [healthy[0], None, healthy[2]]


def test_a_penalty_that_overflows_fails_its_row():
    logits = torch.full((1, 10), 3e38)
    assert sample(logits, [make_sequence(SamplingParams(repetition_penalty=0.5))]) == [None]


def test_logits_at_the_end_of_the_range_are_drawn_from():
    logits = torch.full((10,), -3e38)
    logits[6] = 3e38
    assert draw(logits, top_p=0.9, logprobs=1).token_id == 6


def test_no_rows_draw_nothing():
    assert sample(torch.empty(0, VOCAB_SIZE), []) == []


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_uniforms_are_those_of_numpys_philox(seed, counter):
    word = int(np.random.Philox(key=seed, counter=(counter - 1) % 2**256).random_raw())
    assert philox_uniform(seed, counter) == (word >> 11) * 2.0**-53
