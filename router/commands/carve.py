"""`barista carve`."""

from __future__ import annotations


def command() -> None:
    """carve."""
