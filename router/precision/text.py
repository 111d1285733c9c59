"""The text that the formats of a model are compared on, and the windows of it that the model reads."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

from barista.errors import CheckpointError, ConfigError
from router.tokenizer import Tokenizer

WINDOW = 512  # tokens that the model reads without a break


@dataclass(frozen=True, slots=True)
class Text:
    """name: for people."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Of its UTF-8 bytes, in hex: two runs compare only if it is the same."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def reference_manual() -> Text:
    """The Python language reference as `help()` holds it: half a megabyte of prose and code, on every machine.

    In the order of the topics' names. Copyright Python Software Foundation, PSF License Agreement.
    """
    content = "\n\n".join(text for _, text in sorted(topics.topics.items()))
    return Text(f"the language reference of Python {platform.python_version()}", content)


def read_text(path: Path | None) -> Text:
    """The text of a file, or the reference manual. Raises ConfigError if the file is not there or not UTF-8."""
    if path is None:
        return reference_manual()
    try:
        return Text(str(path), path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--text {path} cannot be read: {error.strerror}.", "Give a file of plain text.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text {path} is not UTF-8 text.", "Convert it to UTF-8.") from error


def text_windows(
    text: Text, tokenizer: Tokenizer, num_tokens: int, max_position: int, vocab_size: int
) -> list[list[int]]:
    """Windows of the text, as many as come closest to num_tokens without exceeding them, all of one length.

    max_position, vocab_size: the model's. Each window begins with what the tokenizer puts before a text.
    Raises ConfigError if the text is too short, CheckpointError if the tokenizer has ids that the model lacks.
    """
    prefix = tokenizer.encode("", add_special_tokens=True)
    ids = tokenizer.encode(text.content, add_special_tokens=False)
    if max(ids, default=0) >= vocab_size:
        raise CheckpointError(
            f"The tokenizer gives token {max(ids)}, and the model's vocabulary ends at {vocab_size - 1}.",
            "Use the tokenizer that belongs to this checkpoint.",
        )
    if len(ids) < num_tokens:
        raise ConfigError(
            f"{text.name} has {len(ids):,} tokens, of which {num_tokens:,} are asked for.",
            "Give --text a longer file, or ask for fewer --tokens.",
        )
    return spread(ids, prefix, num_tokens, min(WINDOW, num_tokens, max_position))


def spread(ids: Sequence[int], prefix: Sequence[int], num_tokens: int, length: int) -> list[list[int]]:
    """num_tokens // length pieces, spread evenly over ids from its first to its last token, each behind the prefix and
    `length` long with it. ids: at least num_tokens."""
    count, piece = num_tokens // length, length - len(prefix)
    last = len(ids) - piece
    starts = [round(index * last / max(1, count - 1)) for index in range(count)]
    return [[*prefix, *ids[start : start + piece]] for start in starts]
