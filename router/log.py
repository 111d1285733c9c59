"""Where the log lines of a command go: to standard error, which leaves standard output to its result."""

from __future__ import annotations

import logging
import sys


def log_to_stderr(level: str) -> None:
    """level: as of --log-level."""
    logging.basicConfig(level=level.upper(), stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
