"""Text to token ids and back, with a checkpoint's own tokenizer. No torch, no transformers, no guessed class."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, processors

from barista.errors import CheckpointError, InvalidRequest
from experts.checkpoint.gguf_header import read_gguf_header
from experts.checkpoint.open import find_gguf
from experts.checkpoint.safetensors_dir import read_json_object
from router.gguf_tokenizer import adds_bos, build_gguf_tokenizer

# A character has at most four bytes, so tokens that still end in U+FFFD after this many will not be mended by more.
MAX_HELD_TOKENS = 8


class Tokenizer:
    """A checkpoint's tokenizer and what else its files say about text.

    eos_token_ids: every id that ends an answer, the most authoritative source first. bos_token, eos_token: their text,
    "" where there is none. chat_template: Jinja source, or None for a model that only completes.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str,
        eos_token_ids: tuple[int, ...],
        eos_token: str = "",
        chat_template: str | None = None,
        add_bos_token: bool = False,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.bos_token = bos_token
        self.eos_token_ids = eos_token_ids
        self.eos_token = eos_token or (backend.id_to_token(eos_token_ids[0]) if eos_token_ids else None) or ""
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(index for index, token in added.items() if token.special)
        self.is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        bos_id = backend.token_to_id(bos_token) if bos_token else None
        if add_bos_token and bos_id is not None and bos_id not in backend.encode("").ids:
            backend.post_processor = processors.TemplateProcessing(
                single=[bos_token, "$A"], special_tokens=[(bos_token, bos_id)]
            )

    @classmethod
    def from_checkpoint(cls, path: Path) -> Tokenizer:
        """The tokenizer of the model at `path`, a directory with tokenizer.json or a GGUF model.

        Raises CheckpointError if there is none or it cannot be reproduced exactly.
        """
        if path.is_dir() and (path / "tokenizer.json").is_file():
            return _from_directory(path)
        gguf = find_gguf(path)
        if gguf is None:
            raise _no_tokenizer(path)
        return _from_gguf(gguf)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that are equal for equal tokenizers."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()[:16]

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. The model's logits may have more, unused entries."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids. add_special_tokens: also what the tokenizer puts around a text, such as BOS; a rendered chat
        template has it already. Raises InvalidRequest for a text that is not valid Unicode."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"The text has a lone surrogate at character {error.start}.") from error
        # A batch of one, because only batches release the GIL: a long text would hold up every stream otherwise.
        return self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of these tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token alone, special ones included; a part of a character becomes U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for: b"" for an id outside the vocabulary."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            return _byte_level(token)
        if len(token) == 6 and token.startswith("<0x"):  # SentencePiece's byte fallback
            return bytes.fromhex(token[3:5])
        return token.replace("▁", " ").encode()

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads with equal results.

        All EOS ids but the first are left to generation_config.json.
        """
        self._backend.save(str(directory / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "bos_token": self.bos_token or None,
            "eos_token": self.eos_token or None,
            "chat_template": self.chat_template,
        }
        present = {key: value for key, value in config.items() if value is not None}
        (directory / "tokenizer_config.json").write_text(json.dumps(present, indent=2, ensure_ascii=False) + "\n")


class IncrementalDecoder:
    """Turns a stream of tokens into a stream of text that never has to be taken back.

    The pieces of `push` and the last of `flush` add up to Tokenizer.decode of all tokens, in linear time.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._window: list[int] = []  # tokens whose text is known, then tokens that are held back
        self._num_known = 0

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token; "" while a character is incomplete."""
        if token_id in self._skipped:
            return ""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self._window.append(token_id)
        return self._release(MAX_HELD_TOKENS)

    def flush(self) -> str:
        """What was held back, at the end of the stream; an incomplete character becomes U+FFFD."""
        return self._utf8.decode(b"", final=True) if self._tokenizer.is_byte_level else self._release(0)

    def _release(self, max_held: int) -> str:
        """Decode the held tokens behind the known ones, so that a decoder that strips a leading space sees it inside.

        The way of vLLM and text-generation-inference: two offsets into the tokens, with a window that stays short.
        """
        held = len(self._window) - self._num_known
        known = self._tokenizer.decode(self._window[: self._num_known], skip_special_tokens=False)
        text = self._tokenizer.decode(self._window, skip_special_tokens=False)
        if held == 0 or (text.endswith("�") and held <= max_held):
            return ""
        self._window = self._window[self._num_known :]
        self._num_known = len(self._window)
        return text[len(known) :]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, reversed (openai/gpt-2, src/encoder.py, bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    """A token's bytes; one with a character outside the alphabet (an added token) is its own text, as in tokenizers."""
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        return token.encode()


def _from_directory(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(f"{file}: not a tokenizer ({str(error)[:120]}).") from error
    config = _optional_json(path / "tokenizer_config.json")
    eos_token = _content(config.get("eos_token"))
    sources = [
        _optional_json(path / "generation_config.json").get("eos_token_id"),
        _optional_json(path / "config.json").get("eos_token_id"),
        backend.token_to_id(eos_token) if eos_token else None,
    ]
    return Tokenizer(
        backend,
        bos_token=_content(config.get("bos_token")),
        eos_token=eos_token,
        eos_token_ids=_unique_ids(sources),
        chat_template=_directory_template(path, config),
        # transformers' LlamaTokenizerFast adds BOS by this key even if tokenizer.json does not: DeepSeek-V3 needs it.
        add_bos_token=config.get("add_bos_token") is True,
    )


def _no_tokenizer(path: Path) -> CheckpointError:
    """Some models (Kimi-K2) come with tiktoken's file and code of their own, which is never run here."""
    if not (path / "tiktoken.model").is_file():
        return CheckpointError(f"{path}: has no tokenizer.json.", "Download it again with: barista pull NAME")
    return CheckpointError(
        f"{path}: has tiktoken.model but no tokenizer.json, which Barista reads.",
        "Convert it once, where transformers is installed: "
        "AutoTokenizer.from_pretrained(PATH).save_pretrained(PATH) writes tokenizer.json.",
    )


def _from_gguf(path: Path) -> Tokenizer:
    metadata = read_gguf_header(path).metadata
    backend = build_gguf_tokenizer(metadata, path)
    bos_id = metadata.get("tokenizer.ggml.bos_token_id")
    bos_token = backend.id_to_token(bos_id) if isinstance(bos_id, int) else None
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        bos_token=bos_token or "",
        eos_token_ids=_unique_ids(metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")),
        chat_template=template if isinstance(template, str) else None,
        add_bos_token=adds_bos(metadata),
    )


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json_object(file) if file.is_file() else {}


def _content(token: Any) -> str:
    """A token in tokenizer_config.json: its text, or an AddedToken written as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _unique_ids(sources: Iterable[Any]) -> tuple[int, ...]:
    """Each source is an id, a list of ids, or None."""
    ids = [index for source in sources for index in (source if isinstance(source, list) else [source])]
    return tuple(dict.fromkeys(index for index in ids if type(index) is int))


def _directory_template(path: Path, config: dict[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
