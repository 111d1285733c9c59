"""What Ray reads from the environment when it is imported, and its processes inherit."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

_AUTH_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def keeper_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a keeper. What the user has set stays, and so does everything if RAY_ADDRESS is set.

    A local cluster has Ray's token authentication on, with a token that only this cluster knows: nothing is written to
    the home folder. Ray does not kill workers for want of memory, which is counted before experts are loaded.
    """
    if environment.get("RAY_ADDRESS"):
        return dict(environment)
    defaults = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
    if not any(environment.get(name) for name in _AUTH_VARIABLES):
        defaults |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return defaults | dict(environment)
