"""Where a Service's pods serve: its EndpointSlices, listed and watched.

A watch alone is not to be trusted: what happens while it reconnects may never be told, it may be silent for ever, and
old resource versions are forgotten. So no watch is ever resumed: it lasts half a minute at most, and a fresh list
follows however it ends. While the API server is away the last known list stands.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from barista.addresses import join
from router.kubernetes.cluster import Cluster, ClusterError

RELIST_SECONDS = 30.0
FIRST_RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 10.0

Slice = dict[str, Any]  # an EndpointSlice of discovery.k8s.io/v1

log = logging.getLogger(__name__)


async def watch_endpoints(
    namespace: str, service: str, port_name: str, relist_seconds: float = RELIST_SECONDS
) -> AsyncGenerator[frozenset[str], None]:
    """Yield the host:port addresses of a Service's port: all of them, first as found and then after each change.

    Endpoints that are not ready are included. The stream never ends by itself. Raises ConfigError where no API server
    is known.
    """
    cluster = await Cluster.connect()
    known: frozenset[str] | None = None
    said = ""
    path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
    retry = FIRST_RETRY_SECONDS
    try:
        while True:
            started = time.monotonic()
            try:
                async with contextlib.aclosing(_slices(cluster, path, service, relist_seconds)) as versions:
                    async for slices in versions:
                        said = ""
                        found = addresses(slices, port_name)
                        if found != known:
                            known = found
                            yield found
            except ClusterError as error:
                text = _explained(error, namespace, service, known)
                if text != said:
                    log.warning("%s", text)
                said = text
            # A watch that ends as soon as it has begun must not become a storm of lists.
            retry = FIRST_RETRY_SECONDS if time.monotonic() - started > retry else min(2 * retry, LONGEST_RETRY_SECONDS)
            await asyncio.sleep(max(0.0, started + retry * random.uniform(0.5, 1.0) - time.monotonic()))
    finally:
        await cluster.close()


def addresses(slices: Iterable[Slice], port_name: str) -> frozenset[str]:
    """host:port of every endpoint. A pod of a dual-stack Service has one, of its IPv4 slice where there is one."""
    found: dict[str, tuple[str, str]] = {}
    for item in slices:
        family = item.get("addressType", "")
        ports = [port["port"] for port in item.get("ports") or [] if port.get("name", "") == port_name]
        if family not in ("IPv4", "IPv6") or not ports or ports[0] is None:
            continue
        for endpoint in item.get("endpoints") or []:
            host = endpoint["addresses"][0]  # the others stand for the same endpoint
            pod = (endpoint.get("targetRef") or {}).get("uid") or host
            address = join(host, ports[0])
            found[pod] = min(found.get(pod, (family, address)), (family, address))
    return frozenset(address for _, address in found.values())


async def _slices(cluster: Cluster, path: str, service: str, seconds: float) -> AsyncGenerator[list[Slice], None]:
    """The Service's slices as listed, then after each change, for so long."""
    selector = {"labelSelector": f"kubernetes.io/service-name={service}"}
    listed = await cluster.get(path, **selector)
    slices = {item["metadata"]["name"]: item for item in listed.get("items") or []}
    yield list(slices.values())
    watch = cluster.watch(path, listed["metadata"]["resourceVersion"], seconds, **selector)
    async with contextlib.aclosing(watch) as events:
        async for kind, item in events:
            name = item["metadata"]["name"]
            if kind == "DELETED":
                slices.pop(name, None)
            else:
                slices[name] = item
            yield list(slices.values())


def _explained(error: ClusterError, namespace: str, service: str, known: frozenset[str] | None) -> str:
    keeping = "none is known yet" if known is None else f"the last {len(known)} known stay in use"
    text = f"The endpoints of Service {namespace}/{service} cannot be read; {keeping}: {error}."
    if error.status == 403:
        text += " Allow list and watch of endpointslices (discovery.k8s.io) in the namespace's Role."
    return text
