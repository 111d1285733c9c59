"""`barista chat`."""

from __future__ import annotations


def command() -> None:
    """chat."""
