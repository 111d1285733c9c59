"""Who may call the API, and who may change its pool: files of keys, of which only digests are kept."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from barista.config import ServeConfig
from barista.errors import ConfigError
from router.loopback import is_loopback


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """sha256 of each key. api: those that every route asks for; empty: none is needed. admin: may change the pool."""

    api: tuple[bytes, ...] = ()
    admin: tuple[bytes, ...] = ()


def read_keys(config: ServeConfig) -> Keys:
    """The keys in --api-key-file and --admin-key-file.

    Raises ConfigError: a file cannot be read or holds no key, or there are none and the host is not loopback.
    """
    if config.api_key_file is None and not is_loopback(config.host):
        raise ConfigError(
            f"Listening on {config.host} without API keys is refused.",
            "Give --api-key-file FILE with one key a line, or listen on 127.0.0.1.",
        )
    return Keys(api=_digests(config.api_key_file, "API"), admin=_digests(config.admin_key_file, "admin"))


def _digests(file: Path | None, kind: str) -> tuple[bytes, ...]:
    """One key a line, blank lines and lines that start with # aside."""
    if file is None:
        return ()
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the {kind} keys: {error}.", "Give a text file with one key a line.") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{file} holds no key.", "Write one key a line.")
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)
