"""The engine ends every request exactly once, and one that fails disturbs no other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experts.checkpoint import open_checkpoint
from router.engine.core import default_kv_bytes, kv_blocks
from router.model.load import Model, load_model
from tests import tiny
from tests.engines import Recorder, answer, engine_on, request


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp("model")
    tiny.make("qwen3_moe", directory)
    return load_model(open_checkpoint(directory), torch.float32)


def test_an_end_token_stops_and_is_reported_last(model: Model) -> None:
    free = answer(engine_on(model), [request("a", [5, 6, 7], max_tokens=8, temperature=0)]).tokens["a"]
    stopped = answer(engine_on(model, eos=[free[3]]), [request("a", [5, 6, 7], max_tokens=8, temperature=0)])
    assert stopped.tokens["a"] == free[: free.index(free[3]) + 1]
    assert stopped.finished == {"a": "stop"}


def test_a_token_outside_the_vocabulary_fails_that_request_alone(model: Model) -> None:
    both = answer(engine_on(model), [request("bad", [5, 131]), request("good", [5, 6], max_tokens=3)])
    assert both.failed == {"bad": "invalid_request"}
    assert len(both.tokens["good"]) == 3


def test_a_request_too_long_for_the_cache_fails_that_request_alone(model: Model) -> None:
    both = answer(engine_on(model, blocks=4), [request("long", range(3, 20)), request("good", [5, 6], max_tokens=3)])
    assert both.failed == {"long": "context_length_exceeded"}
    assert len(both.tokens["good"]) == 3


def test_an_expert_that_is_not_finite_fails_only_the_requests_that_meet_it(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp("broken")
    theirs = tiny.make("qwen3_moe", directory)
    healthy = load_model(open_checkpoint(directory), torch.float32)
    submits = [request(str(i), [3 + 7 * i, 4 + 5 * i], max_tokens=2, temperature=0) for i in range(12)]
    counts = {s.request_id: _experts_met(healthy, s) for s in submits}
    layer, expert = min(
        ((layer, e) for layer in range(3) for e in range(10)),
        key=lambda pair: abs(sum(pair in met for met in counts.values()) - 6),
    )
    with torch.no_grad():
        theirs.model.layers[layer].mlp.experts.down_proj[expert, 0, 0] = float("nan")
    theirs.save_pretrained(directory)
    broken = load_model(open_checkpoint(directory), torch.float32)
    recorder = answer(engine_on(broken), submits)
    touched = {name for name, met in counts.items() if (layer, expert) in met}
    assert 0 < len(touched) < len(submits)
    assert recorder.failed == dict.fromkeys(touched, "nonfinite")
    clean = answer(engine_on(healthy), submits)
    assert all(recorder.tokens[name] == clean.tokens[name] for name in clean.tokens if name not in touched)


def test_a_request_whose_expert_cannot_be_reached_is_told_so(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = model.trunk.forward

    def two_fail(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits, failed = forward(*args)
        failed[0] = failed[3] = True
        return logits, failed

    lost = torch.tensor([True, False, False, False, False, False])
    group = SimpleNamespace(unavailable=lambda step: lost if step == 0 else None)
    monkeypatch.setattr(model.trunk, "forward", two_fail)
    monkeypatch.setattr(model, "remote", SimpleNamespace(group=group))
    engine = engine_on(model)
    for name in ("lacking", "broken", "well"):
        engine.submit(request(name, [5, 6], max_tokens=1))
    recorder = Recorder()
    recorder.record(engine.step())
    assert recorder.failed == {"lacking": "expert_unavailable", "broken": "nonfinite"}
    assert len(recorder.tokens["well"]) == 1


def _experts_met(model: Model, submit: object) -> set[tuple[int, int]]:
    assert model.pool is not None
    before = model.pool.expert_tokens.clone()
    answer(engine_on(model), [submit])  # type: ignore[list-item]
    met = (model.pool.expert_tokens - before).nonzero().tolist()
    return {(layer, expert) for layer, expert in met}


def test_every_routed_token_is_counted_once_per_chosen_expert(model: Model) -> None:
    engine = engine_on(model)
    before = torch.tensor(engine.stats().expert_tokens).sum(dim=1)
    answer(engine, [request("a", range(5, 15), max_tokens=4, temperature=0)])
    counted = torch.tensor(engine.stats().expert_tokens).sum(dim=1) - before
    rows, top_k = 10 + 3, 3
    assert counted.tolist() == [rows * top_k] * 3


def test_an_abort_frees_the_blocks_before_the_next_step(model: Model) -> None:
    engine = engine_on(model)
    engine.submit(request("a", range(5, 25), max_tokens=9))
    Recorder().record(engine.step())
    assert engine.stats().kv_blocks_used > 0
    engine.abort(("a",))
    assert engine.stats().kv_blocks_used == 0
    assert not engine.has_work


@pytest.mark.parametrize(
    ("tokens", "size", "default", "blocks"),
    [(160, None, 10**12, 10), (None, 0, 10**12, 1), (None, None, 0, 1)],
)
def test_the_cache_is_as_large_as_asked_for(model: Model, tokens: int, size: int, default: int, blocks: int) -> None:
    assert kv_blocks(model, 16, tokens, size, default) == blocks


def test_unasked_the_cache_takes_a_gibibyte_but_never_half_of_what_is_free(model: Model) -> None:
    assert default_kv_bytes(model, 10**12) == 2**30
    assert default_kv_bytes(model, 2**20) == 2**19


def test_a_step_that_raises_ends_its_requests_and_no_others(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_on(model)
    forward = model.trunk.forward

    def out_of_memory(*args: object) -> None:
        raise MemoryError

    engine.submit(request("hit", [5, 6], max_tokens=3))
    monkeypatch.setattr(model.trunk, "forward", out_of_memory)
    recorder = Recorder()
    recorder.record(engine.step())
    assert recorder.failed == {"hit": "internal"}
    assert engine.stats().kv_blocks_used == 0
    monkeypatch.setattr(model.trunk, "forward", forward)
    assert len(answer(engine, [request("next", [5, 6], max_tokens=3)]).tokens["next"]) == 3


def test_an_engine_whose_steps_keep_raising_gives_up(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(model.trunk, "forward", broken)
    with pytest.raises(RuntimeError, match="broken"):
        answer(engine_on(model), [request(str(i), [5, 6], max_tokens=3) for i in range(99)])
