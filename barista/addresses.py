"""host:port as text, IPv6 in brackets."""

from __future__ import annotations

import re

_HOST_PORT = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


def join(host: str, port: int) -> str:
    """host:port. host: a name or an address, without brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_host_port(text: str) -> bool:
    """Whether it may be one, with a port that there can be."""
    match = _HOST_PORT.fullmatch(text)
    return match is not None and is_port(match[1])


def is_port(text: str) -> bool:
    """Whether it is a number from 1 to 65535."""
    return text.isdecimal() and 0 < int(text) < 65536
