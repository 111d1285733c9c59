"""Carving whole checkpoints: with every expert chosen a carved model is the dense one, for every family it takes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers
from safetensors import safe_open
from tokenizers import decoders, models, pre_tokenizers

import router.carve
import router.carve.writer
from barista.errors import CacheError, CheckpointError, ConfigError
from router.carve import CarveOptions, Layout, carve
from router.carve.clustering import LayerRecipe
from router.carve.recipe import Recipe
from tests.tiny import make

EVERY_EXPERT = CarveOptions(expert_size=8, num_shared=2, top_k=10, max_tokens=1024)
TEXT = "A barista knows which cup is whose, and the milk that each of them takes. " * 40


def quiet(fraction: float, message: str) -> None:
    assert 0.0 <= fraction <= 1.0


def write_tokenizer(folder: Path) -> None:
    vocabulary = {text: index + 3 for index, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "<pad>": 2} | vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in ("<s>", "</s>", "<pad>")])
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def tiny_source(family: str, folder: Path, **changes) -> transformers.PreTrainedModel:
    model = make(family, folder, vocab_size=259, **changes)
    write_tokenizer(folder)
    return model


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "dense"
    tiny_source("qwen3", folder)
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def with_text(options: CarveOptions, text: Path, **changes) -> CarveOptions:
    values = {field: getattr(options, field) for field in options.__dataclass_fields__}
    return CarveOptions(**values | {"text": text} | changes)


def load(folder: Path) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == "Glm4MoeForCausalLM"
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.inference_mode()
def test_with_every_expert_chosen_a_carved_model_is_the_dense_one(family, tmp_path, text):
    dense = tiny_source(family, tmp_path / "dense")
    report = carve(tmp_path / "dense", tmp_path / "out", options=with_text(EVERY_EXPERT, text), progress=quiet)
    carved = load(tmp_path / "out")
    assert report.layout == Layout(expert_size=8, num_shared=2, num_experts=10, top_k=10)
    assert (report.num_layers, report.lost_energy) == (3, 0.0)
    ids = torch.randint(3, 259, (2, 100), generator=torch.Generator().manual_seed(1))
    difference = (carved(ids).logits - dense(ids).logits).abs().max()
    assert 0 < difference < 0.05, "equal up to the gate's small weights"
    wanted, found = (
        model.generate(ids[:1, :20], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=2)
        for model in (dense, carved)
    )
    assert wanted.tolist() == found.tolist()


@torch.inference_mode()
def test_choosing_fewer_experts_changes_the_logits(tmp_path, text, source):
    dense = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    report = carve(source, tmp_path / "out", options=with_text(EVERY_EXPERT, text, top_k=7), progress=quiet)
    ids = torch.arange(3, 103)[None]
    assert (load(tmp_path / "out")(ids).logits - dense(ids).logits).abs().max() > 0.1
    assert 0 < report.lost_energy < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_neuron_of_the_source_is_in_exactly_one_expert_unchanged(dtype, tmp_path, text, source):
    transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(source)
    carve(source, tmp_path / "out", options=with_text(EVERY_EXPERT, text), progress=quiet)
    with (
        safe_open(source / "model.safetensors", "pt") as dense,
        safe_open(tmp_path / "out/model.safetensors", "pt") as out,
    ):
        for part, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            names = ["shared_experts", *(f"experts.{expert}" for expert in range(10))]
            pieces = [out.get_tensor(f"model.layers.1.mlp.{name}.{part}.weight") for name in names]
            neurons = torch.cat(pieces, dim=dim).movedim(dim, 0)
            original = dense.get_tensor(f"model.layers.1.mlp.{part}.weight").movedim(dim, 0)
            assert neurons.dtype == dtype
            assert sorted(neurons.tolist()) == sorted(original.tolist())


def test_the_tokenizer_and_chat_template_come_along(tmp_path, text, source):
    carve(source, tmp_path / "out", options=with_text(EVERY_EXPERT, text), progress=quiet)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == 1


def test_a_large_model_is_written_in_shards(tmp_path, text, source, monkeypatch):
    monkeypatch.setattr(router.carve.writer, "SHARD_BYTES", 100_000)
    carve(source, tmp_path / "out", options=with_text(EVERY_EXPERT, text), progress=quiet)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert load(tmp_path / "out").config.num_experts_per_tok == 10


def test_the_default_text_is_in_the_package(tmp_path, source):
    options = CarveOptions(expert_size=8, num_shared=2, max_tokens=512)
    assert carve(source, tmp_path / "out", options=options, progress=quiet).num_tokens == 512


def test_an_existing_directory_is_only_replaced_by_force(tmp_path, text, source):
    out = tmp_path / "out"
    carve(source, out, options=with_text(EVERY_EXPERT, text), progress=quiet)
    (out / "mine").write_text("kept")
    with pytest.raises(ConfigError, match=r"exists already.*--force"):
        carve(source, out, options=with_text(EVERY_EXPERT, text), progress=quiet)
    assert (out / "mine").read_text() == "kept"
    carve(source, out, options=with_text(EVERY_EXPERT, text, force=True), progress=quiet)
    assert not (out / "mine").exists()
    assert (out / "config.json").exists()


@pytest.mark.parametrize("config", [None, "{}", "[]", "no json", '{"architectures": ["LlamaForCausalLM"]}'])
def test_force_replaces_nothing_but_a_carving(tmp_path, text, source, config):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    if config is not None:
        (out / "config.json").write_text(config)
    with pytest.raises(ConfigError, match="no carved model"):
        carve(source, out, options=with_text(EVERY_EXPERT, text, force=True), progress=quiet)
    assert (out / "mine").read_text() == "kept"


@pytest.mark.parametrize("place", [".", "..", "../.."])
def test_force_never_replaces_the_source_nor_what_holds_it(tmp_path, text, source, place):
    alias = tmp_path / "alias"
    alias.symlink_to(source / place, target_is_directory=True)
    for out in (source / place, alias):
        with pytest.raises(ConfigError, match="holds the source"):
            carve(source, out, options=with_text(EVERY_EXPERT, text, force=True), progress=quiet)
    assert (source / "config.json").exists()


@pytest.mark.parametrize("parent", ["/proc/barista/x", "file/x", "n" * 300])
def test_a_place_that_cannot_be_written_is_named_with_a_remedy_for_out(tmp_path, text, source, parent):
    (tmp_path / "file").touch()
    with pytest.raises(CacheError) as caught:
        carve(source, tmp_path / parent / "out", options=with_text(EVERY_EXPERT, text), progress=quiet)
    assert "OUT" in caught.value.remedy
    assert "BARISTA_CACHE" not in str(caught.value)


def test_a_carving_that_fails_leaves_nothing_and_replaces_nothing(tmp_path, text, source, monkeypatch):
    def full(*_: object) -> None:
        raise CacheError("no space")

    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"architectures": ["Glm4MoeForCausalLM"]}')
    monkeypatch.setattr(router.carve, "write_tensors", full)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CacheError):
        carve(source, out, options=with_text(EVERY_EXPERT, text, force=True), progress=quiet)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_disk_without_room_is_named_with_a_remedy_for_out(tmp_path, text, source, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1))
    with pytest.raises(CacheError, match="has 1 B free") as caught:
        carve(source, tmp_path / "out", options=with_text(EVERY_EXPERT, text), progress=quiet)
    assert "OUT" in caught.value.remedy
    assert "BARISTA_CACHE" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "message"), [("mixtral", "MixtralForCausalLM is not a dense"), ("llama_bias", "no place in Glm4Moe")]
)
def test_what_cannot_be_carved_is_refused_by_name(family, message, tmp_path, text):
    tiny_source(family, tmp_path / "source")
    with pytest.raises(CheckpointError, match=message):
        carve(tmp_path / "source", tmp_path / "out", options=with_text(EVERY_EXPERT, text), progress=quiet)


def test_a_text_that_cannot_be_used_is_named(tmp_path, source):
    for content, message in ((b"short", "has 5 tokens"), (b"\xff\xfe", "is not UTF-8"), (None, "cannot be read")):
        file = tmp_path / "bad.txt"
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            carve(source, tmp_path / "out", options=with_text(EVERY_EXPERT, file), progress=quiet)


def test_a_recipe_survives_its_file(tmp_path):
    torch.manual_seed(0)
    layout = Layout(expert_size=8, num_shared=2, num_experts=10, top_k=7)
    layers = [LayerRecipe(torch.randperm(96), torch.randn(10, 16).half().float(), torch.randn(10)) for _ in range(3)]
    Recipe(layout, tuple(layers)).save(tmp_path / "recipe")
    found = Recipe.load(tmp_path / "recipe")
    assert found.layout == layout
    for before, after in zip(layers, found.layers, strict=True):
        assert torch.equal(before.permutation, after.permutation)
        assert torch.equal(before.gate_weight, after.gate_weight)
        assert torch.equal(before.gate_bias, after.gate_bias)
