"""The built-in model: the same text as transformers' generate, from a checkpoint that both load as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from experts.checkpoint import open_checkpoint
from router.chat_template import ChatTemplate
from router.model.device.graphs import Capture
from router.model.load import load_model
from router.models import CARVED_BYTES, prepare_built_in
from router.tokenizer import Tokenizer
from tests.device_models import device_model, run_again
from tests.engines import answer, engine_on, request

pytestmark = pytest.mark.alone

NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 20, 12, 64
TEXT = """The espresso machine was invented in Italy and the first one was shown in Turin in 1884 by Angelo Moriondo.
In Python, a generator is a function that yields values one at a time, and the interpreter keeps its state between
the calls. Water boils at a lower temperature on a mountain because the pressure of the air is lower there. The quick
brown fox jumps over the lazy dog, and then it goes home to sleep until the next morning. Once upon a time there was a
small village by the sea where every family owned a boat. The capital of France is Paris, and the capital of Japan is
Tokyo. To make bread you need flour, water, salt and yeast, and a warm place for the dough to rise. A prime number has
no divisors but one and itself; there are infinitely many of them, as Euclid proved more than two thousand years ago."""


@pytest.fixture(scope="module")
def house_blend() -> Path:
    return prepare_built_in(lambda fraction, message: None)


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Different places of a text, of equal length: transformers then needs no padding, which changes its sums."""
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    step = (len(ids) - PROMPT_TOKENS) // (NUM_PROMPTS - 1)
    return [ids[i * step : i * step + PROMPT_TOKENS] for i in range(NUM_PROMPTS)]


def test_its_greedy_text_is_that_of_transformers_generate(house_blend: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(house_blend, dtype=torch.float32).eval()
    assert isinstance(theirs, transformers.Glm4MoeForCausalLM)
    tokenizer = Tokenizer.from_checkpoint(house_blend)
    batch = prompts(tokenizer)
    with torch.inference_mode():
        expected = theirs.generate(
            torch.tensor(batch), attention_mask=torch.ones(NUM_PROMPTS, PROMPT_TOKENS, dtype=torch.long),
            max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0,
        )[:, PROMPT_TOKENS:].tolist()  # fmt: skip
    del theirs
    engine = engine_on(load_model(open_checkpoint(house_blend), torch.float32), blocks=NUM_PROMPTS * 20)
    ours = answer(
        engine,
        [request(str(i), p, temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True) for i, p in enumerate(batch)],
    )
    for index, tokens in enumerate(expected):
        assert tokenizer.decode(ours.tokens[str(index)]) == tokenizer.decode(tokens)


def test_its_tokenizer_and_template_are_those_that_transformers_reads(house_blend: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(house_blend)
    ours = Tokenizer.from_checkpoint(house_blend)
    assert ours.encode(TEXT, add_special_tokens=False) == theirs(TEXT, add_special_tokens=False)["input_ids"]
    assert ours.chat_template is not None
    messages = [{"role": "user", "content": "What is coffee?"}]
    rendered = ChatTemplate(ours.chat_template, ours.bos_token, ours.eos_token).render(messages)
    assert rendered == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_the_room_that_is_asked_for_before_carving_is_enough(house_blend: Path) -> None:
    taken = sum(file.stat().st_size for file in house_blend.iterdir())
    assert taken <= CARVED_BYTES < 1.5 * taken


@pytest.mark.parametrize("capture", [None, run_again], ids=["by kernel", "captured"])
def test_its_greedy_text_on_a_device_is_that_of_the_cpus_kernels(house_blend: Path, capture: Capture | None) -> None:
    batch = prompts(Tokenizer.from_checkpoint(house_blend))[:4]
    submits = [request(str(i), p, temperature=0, max_tokens=16, ignore_eos=True) for i, p in enumerate(batch)]
    wanted = answer(engine_on(load_model(open_checkpoint(house_blend), torch.float32)), submits)
    assert answer(engine_on(device_model(house_blend, capture=capture)), submits).tokens == wanted.tokens
