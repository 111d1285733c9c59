"""Checked reading of a config.json: every value has the type and the range that the model needs, or is named.

A file from the internet may hold anything; no number that it claims is used before it is known to be possible.
Torch-free.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from barista.errors import CheckpointError
from experts.checkpoint.types import DOWNLOAD_AGAIN

# Larger than any dimension of a model; the tensors' own shapes are compared with those that the file names.
MAX_SIZE = 2**31 - 1


class ConfigReader:
    """The values of one JSON object by key: the file's, or the family's default where the key is absent.

    Where a method takes several keys, they are names of one value: the first that is present counts, and the default is
    that of the first. A null is a value like any other, and only the methods named `..._or_none` take it. All raise
    CheckpointError naming the key, the value and what is expected.
    """

    def __init__(self, values: Any, defaults: Mapping[str, Any], where: str) -> None:
        """where: what the object is called in messages."""
        if not isinstance(values, dict):
            raise CheckpointError(f"{where} is {_short(values)}, expected an object.", DOWNLOAD_AGAIN)
        self._values: dict[str, Any] = values
        self._defaults = defaults
        self.where = where

    def has(self, key: str) -> bool:
        """Whether the file itself gives a value that is not null."""
        return self._values.get(key) is not None

    def raw(self, *keys: str) -> Any:
        """The value unchecked."""
        key = self._present(keys)
        if key in self._values:
            return self._values[key]
        if key not in self._defaults:
            raise CheckpointError(f"{self.where} lacks the key {key!r}.", "Use a complete checkpoint.")
        return self._defaults[key]

    def _present(self, keys: tuple[str, ...]) -> str:
        return next((key for key in keys if key in self._values), keys[0])

    def whole(self, *keys: str, least: int = 1, most: int = MAX_SIZE) -> int:
        """An integer from least to most."""
        value = self.raw(*keys)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(self._present(keys), f"an integer from {least} to {most}")
        return value

    def whole_or_none(self, key: str) -> int | None:
        """A positive integer or null."""
        return None if self.raw(key) is None else self.whole(key)

    def real(self, key: str, *, above: float = 0.0) -> float:
        """A finite number greater than `above`."""
        value = self.raw(key)
        if type(value) not in (int, float) or not above < value <= sys.float_info.max:
            raise self.wrong(key, f"a finite number above {above:g}")
        return float(value)

    def real_or_none(self, key: str) -> float | None:
        """A positive finite number or null."""
        return None if self.raw(key) is None else self.real(key)

    def flag(self, key: str) -> bool:
        """true or false."""
        value = self.raw(key)
        if type(value) is not bool:
            raise self.wrong(key, "true or false")
        return value

    def indices(self, key: str) -> frozenset[int]:
        """A list of non-negative integers or null, which is an empty one."""
        value = self.raw(key)
        if value is None:
            return frozenset()
        if not isinstance(value, list) or any(type(item) is not int or item < 0 for item in value):
            raise self.wrong(key, "a list of layer numbers")
        return frozenset(value)

    def entries(self, key: str) -> dict[str, Any]:
        """The entries of an object that are not null; none if it is absent or null itself."""
        value = self.raw(key) if self.has(key) else {}
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return {name: entry for name, entry in value.items() if entry is not None}

    def one_of(self, key: str, *choices: str) -> str:
        """One of these words."""
        value = self.raw(key)
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(key, f"one of {', '.join(choices)}")
        return value

    def require(self, key: str, supported: Any) -> None:
        """Refuse a value, if the file gives one, that the family's entry does not compute."""
        if self.has(key) and self._values[key] != supported:
            raise CheckpointError(
                f"{self.where}: {key} = {_short(self._values[key])} is not supported.", f"Only {supported!r} is."
            )

    def wrong(self, key: str, expected: str) -> CheckpointError:
        """The error for this key's value."""
        return CheckpointError(f"{self.where}: {key} is {_short(self.raw(key))}, expected {expected}.", DOWNLOAD_AGAIN)


def _short(value: Any) -> str:
    """A value as JSON would name it, cut to 80 characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
