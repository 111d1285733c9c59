"""The tokenizer of a GGUF file, rebuilt from its metadata: byte-level BPE only.

`tokenizer.ggml.pre` names how text is cut into words before BPE. Each name below stands for the pre-tokenizer of the
family's own tokenizer.json; llama.cpp's src/llama-vocab.cpp has the same expressions. An unknown name is refused:
cutting text in another way gives plausible tokens that the model has never seen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from barista.errors import CheckpointError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


def _splits(*patterns: str) -> PreTokenizer:
    """Cut at every match of each pattern in turn, then spell the pieces in GPT-2's byte alphabet."""
    splits = [Split(Regex(pattern), "isolated") for pattern in patterns]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def _smollm() -> PreTokenizer:
    # Every digit alone, then GPT-2's words: what SmolLM2's tokenizer.json says. llama.cpp's "\p{N}" followed by GPT-2's
    # expression is the same, because Digits tests the same Unicode property.
    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])


def _llama3() -> PreTokenizer:
    return _splits(_LLAMA3)


def _qwen2() -> PreTokenizer:
    return _splits(_QWEN2)


PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {
    "smollm": _smollm,
    "gpt-2": lambda: _splits(_GPT2),
    "qwen2": _qwen2,
    "deepseek-r1-qwen": _qwen2,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
    "deepseek-v3": lambda: _splits(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_V3),
    # What llama.cpp does with a file whose converter did not know the tokenizer.
    "default": lambda: _splits(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_NFC_NAMES = ("qwen2", "deepseek-r1-qwen")

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def build_gguf_tokenizer(metadata: dict[str, Any], path: Path) -> Tokenizer:
    """metadata: of the GGUF file at `path`. Raises CheckpointError for a tokenizer that cannot be rebuilt exactly."""
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if model != "gpt2":
        raise CheckpointError(f"{path}: tokenizer.ggml.model {model!r} is not supported.", "Known: gpt2.")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise CheckpointError(f"{path}: tokenizer.ggml.pre {pre!r} is not supported.", f"Known: {known}.")
    tokenizer = Tokenizer(_bpe(metadata, path, ignore_merges=pre in _LLAMA3_NAMES))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    if pre in _NFC_NAMES:
        tokenizer.normalizer = normalizers.NFC()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type") or []
    for token, token_type in zip(tokens, types, strict=False):
        if token_type in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=token_type == _CONTROL, normalized=False)])
    return tokenizer


def adds_bos(metadata: dict[str, Any]) -> bool:
    """Whether encoding starts with BOS; where the file does not say, llama.cpp's default for its pre-tokenizer."""
    default = metadata.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def _bpe(metadata: dict[str, Any], path: Path, *, ignore_merges: bool) -> models.BPE:
    tokens, merges = (_strings(metadata, f"tokenizer.ggml.{key}", path) for key in ("tokens", "merges"))
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens has {len(tokens) - len(vocab)} duplicates.")
    pairs = [_merge(merge, vocab, path) for merge in merges]
    return models.BPE(vocab=vocab, merges=pairs, ignore_merges=ignore_merges)


def _merge(merge: str, vocab: dict[str, int], path: Path) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not {left, right, left + right} <= vocab.keys():
        raise CheckpointError(f"{path}: tokenizer.ggml.merges: {merge!r} is not a pair of tokens that make a third.")
    return left, right


def _strings(metadata: dict[str, Any], key: str, path: Path) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{path}: metadata {key} is not a list of strings.")
    return value
