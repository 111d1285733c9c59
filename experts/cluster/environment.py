"""What Ray reads from the environment when it is imported, and its processes inherit."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path

_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def keeper_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a keeper. What the user has set stays; Ray's token authentication is on otherwise.

    A local cluster has a token that nobody else knows: nothing is written to the home folder. Its processes listen on
    loopback alone, all of them, because Ray is told to do without clusters of several nodes, as on macOS; no argument
    of ray.init has this effect. Ray does not kill its workers for want of memory, which is counted before experts are
    loaded, and does not run them at niceness 15, where an engine that waits for them would starve them.
    One that is joined at RAY_ADDRESS is shown the token that this machine has, if it has one: `ray start` asks for it
    in that case, and ray.init does not send it.
    """
    has_token = any(environment.get(name) for name in _TOKEN_VARIABLES)
    defaults: dict[str, str] = {}
    if environment.get("RAY_ADDRESS"):
        if has_token or _default_token(environment).exists():
            defaults = {"RAY_AUTH_MODE": "token"}
    else:
        defaults = {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            "RAY_worker_niceness": "0",
        }
        if not has_token and not environment.get("RAY_AUTH_MODE"):
            defaults |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return defaults | dict(environment)


def _default_token(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("HOME", "/")) / ".ray" / "auth_token"
