"""The same cup every time: a request's tokens, and the bytes of its log-probabilities, depend on nothing but itself.

Random schedules change the neighbours, the chunking, the prefix-cache hits and the memory pressure; the answers do not
change. A log-probability is a function of all the logits of its row, so equal ones mean equal logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.checkpoint import open_checkpoint
from router.messages import Submit, Token
from router.model.load import Model, load_model
from tests import tiny
from tests.engines import Recorder, answer, engine_on, request

FAMILIES = ["qwen3_moe", "deepseek_v3", "glm4_moe"]
MAX_PROMPT, MAX_TOKENS = 24, 12


@pytest.fixture(scope="module", params=[(f, d) for f in FAMILIES for d in ("float32", "bfloat16")], ids="-".join)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    family, dtype = request.param
    directory = tmp_path_factory.mktemp(family)
    tiny.make(family, directory)
    return load_model(open_checkpoint(directory), getattr(torch, dtype))


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    """Prompts that share prefixes often: a cut of one of three stems, and an ending of their own."""
    stem = draw(st.sampled_from([range(10, 40), range(60, 90), [7] * 30]))
    head = list(stem)[: draw(st.integers(0, 18))]
    return head + draw(st.lists(st.integers(3, 130), min_size=1, max_size=6))


@st.composite
def requests(draw: st.DrawFn) -> list[Submit]:
    sampling = st.sampled_from([{"temperature": 0.0}, {"temperature": 1.3}, {"temperature": 0.8, "top_p": 0.7}])
    return [
        request(
            str(i), draw(prompts()), max_tokens=draw(st.integers(1, MAX_TOKENS)), seed=draw(st.integers(0, 9)),
            logprobs=0, **draw(sampling),
        )
        for i in range(draw(st.integers(2, 7)))
    ]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    blocks: int
    budget: int
    max_num_seqs: int


SETTINGS = st.builds(
    Setting,
    blocks=st.integers(9, 40),
    budget=st.sampled_from([8, 11, 32, 200]),
    max_num_seqs=st.sampled_from([1, 3, 8]),
)


def alone(model: Model, submit: Submit) -> Recorder:
    return answer(engine_on(model), [submit])


@settings(max_examples=40, deadline=None)
@given(submits=requests(), setting=SETTINGS, stagger=st.integers(0, 3))
def test_no_answer_changes_with_company_chunking_cache_or_pressure(
    model: Model, submits: list[Submit], setting: Setting, stagger: int
) -> None:
    engine = engine_on(model, blocks=setting.blocks, budget=setting.budget, max_num_seqs=setting.max_num_seqs)
    together = Recorder()
    for submit in submits:
        engine.submit(submit)
        for _ in range(stagger):
            together.record(engine.step())
    while engine.has_work:
        together.record(engine.step())
    for submit in submits:
        reference = alone(model, submit)
        assert together.tokens[submit.request_id] == reference.tokens[submit.request_id]
        assert together.logprobs[submit.request_id] == reference.logprobs[submit.request_id]
        assert together.finished[submit.request_id] == "length"


SPLIT = st.floats(0, 1, exclude_max=True)


@settings(max_examples=25, deadline=None)
@given(submits=requests(), split=SPLIT)
def test_an_answer_goes_on_in_another_engine_from_whatever_was_drawn(
    model: Model, submits: list[Submit], split: float
) -> None:
    """Tokens, log-probabilities and indices; penalties look back at what the first engine drew."""
    penalised = [
        msgspec.structs.replace(s, sampling=msgspec.structs.replace(s.sampling, presence_penalty=0.9)) for s in submits
    ]
    whole = {s.request_id: alone(model, s) for s in penalised}
    drawn = {name: record.tokens[name][: int(split * len(record.tokens[name]))] for name, record in whole.items()}
    engine = engine_on(model, blocks=30)
    for submit in penalised:
        engine.submit(msgspec.structs.replace(submit, drawn_token_ids=tuple(drawn[submit.request_id])))
    rest: dict[str, list[Token]] = {name: [] for name in whole}
    while engine.has_work:
        events = engine.step()
        assert not events.failed
        for token in events.tokens:
            rest[token.request_id].append(token)
    for name, record in whole.items():
        done = len(drawn[name])
        assert [token.index for token in rest[name]] == list(range(done, len(record.tokens[name])))
        assert [token.token_id for token in rest[name]] == record.tokens[name][done:]
        assert [token.logprob for token in rest[name]] == record.logprobs[name][done:]
        assert rest[name][-1].finish_reason == "length"


def test_tokens_drawn_elsewhere_are_not_counted_as_cached_tokens_of_the_prompt(model: Model) -> None:
    whole = request("whole", range(10, 22), max_tokens=20, temperature=0)
    engine = engine_on(model)
    drawn = answer(engine, [whole]).tokens["whole"]
    engine.submit(msgspec.structs.replace(whole, request_id="rest", drawn_token_ids=tuple(drawn[:16])))
    (token,) = engine.step().tokens
    assert 0 < token.num_cached_tokens <= len(whole.prompt_token_ids)


def test_more_tokens_drawn_than_asked_for_are_refused(model: Model) -> None:
    submit = msgspec.structs.replace(request("r", [4, 5], max_tokens=2, temperature=0), drawn_token_ids=(7, 8))
    assert answer(engine_on(model), [submit]).failed == {"r": "invalid_request"}


def test_preemption_happens_in_these_settings_and_changes_nothing(model: Model) -> None:
    """The law above would be empty if nothing were ever preempted or found in the cache."""
    submits = [request(str(i), [10 + i, 4, 5, 6], max_tokens=20, temperature=0, logprobs=0) for i in range(4)]
    engine = engine_on(model, blocks=9)
    tight = answer(engine, submits)
    assert engine.stats().num_preemptions > 0
    assert engine.stats().prefix_cache_hits > 0
    assert all(tight.tokens[s.request_id] == alone(model, s).tokens[s.request_id] for s in submits)


def test_an_aborted_neighbour_leaves_no_trace(model: Model) -> None:
    kept = request("kept", [10, 11, 12, 13, 14], max_tokens=12, temperature=0, logprobs=0)
    engine = engine_on(model, blocks=12)
    engine.submit(request("gone", range(20, 45), max_tokens=10))
    engine.submit(kept)
    recorder = Recorder()
    for _ in range(3):
        recorder.record(engine.step())
    engine.abort(("gone",))
    while engine.has_work:
        recorder.record(engine.step())
    assert recorder.logprobs["kept"] == alone(model, kept).logprobs["kept"]
    assert engine.stats().kv_blocks_used == 0
