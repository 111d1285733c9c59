"""Whole models of few bits: every family runs in them, with the memory that was foretold and in every company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experts.checkpoint import open_checkpoint
from experts.formats import Holding
from experts.kernels import parts_of
from experts.numerics import numerics_id
from experts.weights import WeightReader
from experts.worker.store import ExpertStore
from router.memory import held_bytes
from router.model.expert_model import expert_model
from router.model.families import model_spec
from router.model.load import load_model
from tests import packable
from tests.forced import FORCED, PROMPTS, logits_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return packable.own_cache(tmp_path / "cache", monkeypatch)


@pytest.fixture(scope="module", params=packable.CHANGES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packable.make(request.param, tmp_path_factory.mktemp(request.param))


def test_every_familys_logits_in_int8_are_close_to_those_in_float32_and_the_same_in_any_company(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    exact = logits_of(load_model(checkpoint, torch.float32), PROMPTS, FORCED, 512)
    model = load_model(checkpoint, torch.float32, weight_format="int8")
    packed = logits_of(model, PROMPTS, FORCED, 9)
    # The median row: where a gate's two best experts are nearly equal, the smallest difference chooses another one.
    far = torch.cat([(a - b).norm(dim=1) / b.norm(dim=1) for a, b in zip(packed, exact, strict=True)])
    assert far.median() < 0.05
    (alone,) = logits_of(model, PROMPTS[:1], FORCED[:1], 512)
    assert torch.equal(alone, packed[0])


@pytest.mark.parametrize("weight_format", ["int8", "int4", "mxfp4", "fp8"])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_a_model_takes_the_memory_that_was_computed_from_its_headers(
    family: str, weight_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(packable.make(family, tmp_path / "model"))
    held: dict[str, int] = {}
    get, weight = WeightReader.get, WeightReader.weight

    def recording_get(self, name, shape, dtype):  # type: ignore[no-untyped-def]
        held[name] = (tensor := get(self, name, shape, dtype)).nbytes
        return tensor

    def recording_weight(self, name, shape, dtype):  # type: ignore[no-untyped-def]
        tensor = weight(self, name, shape, dtype)
        held[name] = sum(part.nbytes for part in parts_of(tensor))
        return tensor

    load_model(checkpoint, torch.bfloat16, weight_format=weight_format)  # packs it
    monkeypatch.setattr(WeightReader, "get", recording_get)
    monkeypatch.setattr(WeightReader, "weight", recording_weight)
    load_model(checkpoint, torch.bfloat16, weight_format=weight_format)
    expected = held_bytes(checkpoint, model_spec(checkpoint.config), Holding("bfloat16", weight_format))
    gates = {name for name in expected if name.endswith("gate.weight")}  # read in bfloat16, and widened by the gate
    assert {name: held[name] for name in expected.keys() - gates} == {n: expected[n] for n in expected.keys() - gates}


@pytest.mark.parametrize(("family", "expected"), [("llama", "int8"), ("qwen3", "int4")])
def test_an_embedding_keeps_eight_bits_where_it_is_the_head_too(family: str, expected: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(packable.make(family, tmp_path / "model"))
    trunk = load_model(checkpoint, torch.float32, weight_format="int4").trunk
    assert (trunk.head is trunk.embedding) == (expected == "int8")
    assert not isinstance(trunk.embedding, torch.Tensor)
    assert trunk.embedding.format.name == expected


def test_a_worker_packs_only_the_experts_and_takes_what_was_foretold(tmp_path: Path, cache: Path) -> None:
    checkpoint = open_checkpoint(packable.make("qwen3_moe", tmp_path / "model"))
    model = expert_model(checkpoint, Holding("float32", "int4"))
    store = ExpertStore(model, 1 << 30)
    everything = {layer: range(spec.num_experts) for layer, spec in model.layers.items()}
    for _ in store.assign(everything):
        pass
    (folder,) = (cache / "packed").iterdir()
    assert [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")] == ["experts"]
    in_files = sum(file.stat().st_size for file in (folder / "experts").glob("*.bin"))
    assert store.held_bytes <= in_files <= store.held_bytes + 4096 * model.num_experts


def test_other_formats_have_other_digests_and_other_numerics(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(packable.make("qwen3_moe", tmp_path / "model"))
    formats = ("plain", "int8", "int4", "mxfp4", "fp8")
    models = [expert_model(checkpoint, Holding("float32", name)) for name in formats]
    assert len({model.digest for model in models}) == len(formats)
    assert len({numerics_id(torch.float32, model.format) for model in models}) == len(formats)
    stores = [ExpertStore(model, 1 << 30) for model in models]
    for store, model in zip(stores, models, strict=True):
        assert store.model_digest == model.digest
        assert model.from_json(model.to_json()) == model
        for _ in store.assign({0: [0]}):
            pass
    assert len({store.held()[0].digest for store in stores}) == len(formats)
