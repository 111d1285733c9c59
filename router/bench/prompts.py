"""Prompts of a wanted length, made here: nothing is downloaded, and the server's tokenizer is asked where it can be."""

from __future__ import annotations

import random
from collections.abc import Callable

from barista.errors import ConfigError

# Frequent nouns: nearly every BPE vocabulary has a token for each of them with its leading space.
WORDS = """
    air area art back body book boy business car case change child city company country day door education end eye face
    fact family father force friend game girl government group guy hand head health history home hour house idea
    information issue job kid kind law level life line lot man member minute moment money month morning mother name
    night number office parent part party people person place point power problem program question reason research
    result right room school service side state story student study system teacher team thing time war water way week
    woman word work world year
""".split()  # noqa: SIM905  # as a list it would fill a page

CountTokens = Callable[[str], int | None]


def prompt(words: int, seed: int, index: int) -> str:
    """The index-th prompt of a run: `words` words, a function of the three alone.

    Prompts of other seeds and indices begin with other words, so that no prefix cache answers for the server.
    """
    return " ".join(random.Random(f"{seed}/{index}").choices(WORDS, k=words))


def words_for(tokens: int, count: CountTokens) -> int:
    """How many words make a chat of about `tokens` tokens, at least one.

    count: the tokens of a chat whose one message is the text, template included; None if the server does not count.
    The answer lies on the line through two counts, so it is exact where every word is one token. Without counts a
    word is taken for a token and the template for nothing.

    Raises ConfigError: a chat of one word is longer than that.
    """
    shortest, longer = count(prompt(1, 0, 0)), count(prompt(1 + tokens, 0, 0))
    if shortest is None or longer is None or longer <= shortest:
        return tokens
    if shortest > tokens:
        raise ConfigError(
            f"--input-len {tokens} is too short: with its template, a chat of one word has {shortest} tokens.",
            f"Give at least --input-len {shortest}.",
        )
    return 1 + round((tokens - shortest) * tokens / (longer - shortest))
