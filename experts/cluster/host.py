"""Where a server of a pool listens: decided in the process that serves, which Ray may restart on another node."""

from __future__ import annotations

import ray

from barista.errors import ConfigError
from experts.cluster.messages import PoolConfig

LOOPBACK = "127.0.0.1"


def listening_host(config: PoolConfig, home: str) -> str:
    """The address of this node where connections are encrypted, else loopback.

    home: the address of the node where the pool was made. Raises ConfigError on another one without encryption.
    """
    here: str = ray.util.get_node_ip_address()
    if config.tls_dir is not None:
        return here
    if here != home:
        raise elsewhere([here])
    return LOOPBACK


def elsewhere(hosts: list[str]) -> ConfigError:
    """Servers on these hosts would speak unencrypted over the network."""
    return ConfigError(
        f"Workers on other hosts ({', '.join(hosts)}) are refused without encryption.",
        "Give --tls-dir with certificates that all of these hosts have, or offer the resource "
        "barista_worker on one host only.",
    )
