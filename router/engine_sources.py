"""Where engines may be: a list of hosts, the endpoints of a Kubernetes Service, or the nodes of a Ray cluster.

A source only names candidates. Whether one is an engine, and serves, its health says (router.engine_link).
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial

from barista.addresses import is_host_port, is_port, join
from barista.errors import ConfigError
from router.engine_port import ENGINE_PORT
from router.engines import Source
from router.ray_api import RayApi

log = logging.getLogger(__name__)


LOOK_SECONDS = 5.0
_SERVICE = re.compile(r"[a-z0-9-]+/[a-z0-9-]+")


def engine_source(text: str, environ: Mapping[str, str] = os.environ) -> Source:
    """The source that `--engines` names. Raises ConfigError."""
    kind, _, rest = text.partition(":")
    if kind == "kubernetes" and _SERVICE.fullmatch(rest):
        namespace, _, service = rest.partition("/")
        return partial(_endpoints, namespace, service)
    if kind == "ray" and rest.startswith(("http://", "https://")):
        url, _, port = rest.partition("#")
        if not port or is_port(port):
            return partial(_nodes, RayApi(url, environ), int(port or ENGINE_PORT))
    hosts = text.split(",")
    if all(map(is_host_port, hosts)):
        return partial(_resolved, hosts)
    raise ConfigError(
        f"engines is {text!r}, which names no engines.",
        "Give HOST:PORT, several of them with commas between, kubernetes:NAMESPACE/SERVICE, or ray:URL with the URL of "
        "a Ray cluster's dashboard (and #PORT, if its engines have another one than 50051).",
    )


def _endpoints(namespace: str, service: str) -> AsyncIterator[frozenset[str]]:
    from router.kubernetes.discovery import watch_endpoints  # here, because nothing else needs Kubernetes

    return watch_endpoints(namespace, service, "engine")


async def _resolved(hosts: list[str]) -> AsyncIterator[frozenset[str]]:
    """A name may stand for many addresses, and for others later."""
    async for addresses in _changes(_Hosts(hosts).look):
        yield addresses


async def _nodes(api: RayApi, port: int) -> AsyncIterator[frozenset[str]]:
    async def look() -> frozenset[str]:
        return frozenset(join(ip, port) for ip in await api.node_addresses())

    async for addresses in _changes(look):
        yield addresses


async def _changes(look: Callable[[], Awaitable[frozenset[str]]]) -> AsyncIterator[frozenset[str]]:
    """What `look` finds, whenever it is something else than before. While it fails, what it found last stays."""
    before: frozenset[str] | None = None
    complaint = ""
    while True:
        try:
            found = await look()
        except (OSError, ConfigError) as error:
            if str(error) != complaint:
                complaint = str(error)
                log.warning("Engines cannot be looked for: %s", error)
        else:
            complaint = ""
            if found != before:
                before = found
                yield found
        await asyncio.sleep(LOOK_SECONDS if before else 1.0)


class _Hosts:
    """HOST:PORT each. A host that cannot be found keeps the addresses that it had, and disturbs no other."""

    def __init__(self, hosts: list[str]) -> None:
        self._hosts = hosts
        self._known: dict[str, frozenset[str]] = {}
        self._unknown: set[str] = set()

    async def look(self) -> frozenset[str]:
        """Every address of every host."""
        for entry in self._hosts:
            try:
                self._known[entry] = await _resolve(entry)
                self._unknown.discard(entry)
            except (OSError, UnicodeError) as error:
                if entry not in self._unknown:
                    log.warning(
                        "Engines cannot be looked for at %s: %s.", entry, getattr(error, "strerror", "") or error
                    )
                self._unknown.add(entry)
        return frozenset().union(*self._known.values())


async def _resolve(entry: str) -> frozenset[str]:
    host, _, port = entry.rpartition(":")
    loop = asyncio.get_running_loop()
    infos = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    return frozenset(join(str(info[4][0]), int(port)) for info in infos)
