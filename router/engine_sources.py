"""Where engines may be: a list of hosts, the endpoints of a Kubernetes Service, or the nodes of a Ray cluster.

A source only names candidates. Whether one is an engine, and serves, its health says (router.engine_link).
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial

import httpx

from barista.errors import ConfigError
from router.engine_port import ENGINE_PORT
from router.engines import Source
from router.ray_api import RayApi

log = logging.getLogger(__name__)


LOOK_SECONDS = 5.0
_HOST = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")
_SERVICE = re.compile(r"[a-z0-9-]+/[a-z0-9-]+")


def engine_source(text: str, environ: Mapping[str, str] = os.environ) -> Source:
    """The source that `--engines` names. Raises ConfigError."""
    kind, _, rest = text.partition(":")
    if kind == "kubernetes" and _SERVICE.fullmatch(rest):
        namespace, _, service = rest.partition("/")
        return partial(_endpoints, namespace, service)
    if kind == "ray" and rest.startswith(("http://", "https://")):
        return partial(_nodes, RayApi(rest, environ))
    hosts = text.split(",")
    if all(_HOST.fullmatch(host) for host in hosts):
        return partial(_resolved, hosts)
    raise ConfigError(
        f"engines is {text!r}, which names no engines.",
        "Give HOST:PORT, several of them with commas between, kubernetes:NAMESPACE/SERVICE, or ray:URL with the URL of "
        "a Ray cluster's dashboard.",
    )


def _endpoints(namespace: str, service: str) -> AsyncIterator[frozenset[str]]:
    from router.kubernetes.discovery import watch_endpoints  # here, because nothing else needs Kubernetes

    return watch_endpoints(namespace, service, "engine")


async def _resolved(hosts: list[str]) -> AsyncIterator[frozenset[str]]:
    """A name may stand for many addresses, and for others later."""
    async for addresses in _changes(lambda: _resolve(hosts)):
        yield addresses


async def _nodes(api: RayApi) -> AsyncIterator[frozenset[str]]:
    async def look() -> frozenset[str]:
        return frozenset(_join(ip, ENGINE_PORT) for ip in await api.node_addresses())

    async for addresses in _changes(look):
        yield addresses


async def _changes(look: Callable[[], object]) -> AsyncIterator[frozenset[str]]:
    """What `look` finds, whenever it is something else than before. While it fails, what it found last stays."""
    before: frozenset[str] | None = None
    complaint = ""
    while True:
        try:
            found: frozenset[str] = await look()  # type: ignore[misc]
        except (OSError, httpx.HTTPError, ConfigError) as error:
            if str(error) != complaint:
                complaint = str(error)
                log.warning("Engines cannot be looked for: %s", error)
        else:
            complaint = ""
            if found != before:
                before = found
                yield found
        await asyncio.sleep(LOOK_SECONDS if before else 1.0)


async def _resolve(hosts: list[str]) -> frozenset[str]:
    loop = asyncio.get_running_loop()
    found: set[str] = set()
    for entry in hosts:
        host, _, port = entry.rpartition(":")
        try:
            infos = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise OSError(f"{host}: {error.strerror}") from error
        found |= {_join(str(info[4][0]), int(port)) for info in infos}
    return frozenset(found)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
