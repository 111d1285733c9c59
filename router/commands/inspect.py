"""`barista inspect`."""

from __future__ import annotations


def command() -> None:
    """inspect."""
