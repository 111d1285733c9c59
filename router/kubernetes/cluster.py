"""The API server that this process talks to: plain JSON in and out, one exception for whatever goes wrong.

Objects stay dictionaries: the client's models refuse what real servers send, such as an EndpointSlice whose `endpoints`
is null.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from kubernetes.aio import client, config

from barista.errors import ConfigError

REQUEST_SECONDS = 10.0
MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"


class ClusterError(Exception):
    """The API server refused a request, or did not answer. status: HTTP's, or 0 without an answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status} {message}" if status else message)
        self.status = status


class Event(NamedTuple):
    """One line of a watch. kind: ADDED, MODIFIED or DELETED."""

    kind: str
    item: dict[str, Any]


class Cluster:
    """Requests to one API server. Paths are the API's own, such as /api/v1/nodes/NAME; every call raises ClusterError.

    Belongs to the event loop that it was made in.
    """

    def __init__(self, configuration: client.Configuration) -> None:
        self._client = client.ApiClient(configuration)

    @classmethod
    async def connect(cls) -> Cluster:
        """As $KUBECONFIG says, else as this pod's service account, else by ~/.kube/config. Raises ConfigError."""
        configuration = client.Configuration()
        given = os.environ.get("KUBECONFIG", "")
        path = given or str(Path("~/.kube/config").expanduser())
        try:
            if not given and "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(configuration)
            elif given or Path(path).is_file():
                await config.load_kube_config(config_file=path, client_configuration=configuration)
            else:
                raise ConfigError(
                    "This process does not run in a Kubernetes pod, and there is no kubeconfig.",
                    "Set KUBECONFIG to the path of one, or leave the flag out that names a Kubernetes namespace.",
                )
        except config.ConfigException as error:
            where = f"the kubeconfig {path}" if given or "KUBERNETES_SERVICE_HOST" not in os.environ else "this pod"
            raise ConfigError(
                f"No Kubernetes API server is known from {where}: {error}",
                "In a pod: set automountServiceAccountToken. Elsewhere: check the file that KUBECONFIG names.",
            ) from error
        return cls(configuration)

    async def close(self) -> None:
        """End the connections. Idempotent."""
        await self._client.close()

    async def get(self, path: str, **query: str) -> Any:
        """Read one object, or a list."""
        return await self._json("GET", path, query)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """Create an object."""
        return await self._json("POST", path, {}, body)

    async def patch(self, path: str, body: Any, kind: str) -> Any:
        """Change an object. kind: one of the content types above."""
        return await self._json("PATCH", path, {}, body, kind)

    async def watch(self, path: str, version: str, seconds: float, **query: str) -> AsyncGenerator[Event, None]:
        """Changes of a list since `version`, for so many seconds and no longer, whatever the server does."""
        query |= {"watch": "true", "resourceVersion": version, "timeoutSeconds": str(max(1, round(seconds)))}
        try:
            # A watch may be silent for as long as it lasts, so only the whole of it has a limit. The server ends it
            # first, unless it has gone away without a word.
            response = await self._send("GET", path, query, aiohttp.ClientTimeout(total=seconds + 1.0))
            try:
                async for line in response.content:
                    change = json.loads(line)
                    if change["type"] == "ERROR":
                        raise ClusterError(change["object"].get("code", 500), change["object"].get("message", ""))
                    if change["type"] != "BOOKMARK":
                        yield Event(change["type"], change["object"])
            finally:
                response.close()
        except TimeoutError:
            return
        except (aiohttp.ClientError, OSError, ValueError, KeyError) as error:
            raise ClusterError(0, f"the watch has broken off: {_text(error)}") from error

    async def _json(self, method: str, path: str, query: dict[str, str], body: Any = None, kind: str = "") -> Any:
        limit = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
        try:
            response = await self._send(method, path, query, limit, body, kind)
            return json.loads(await response.read())
        except TimeoutError as error:
            raise ClusterError(0, f"no answer within {REQUEST_SECONDS:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ClusterError(0, f"no answer: {_text(error)}") from error

    async def _send(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        limit: aiohttp.ClientTimeout,
        body: Any = None,
        kind: str = "",
    ) -> aiohttp.ClientResponse:
        """The answer's head has come, and says yes."""
        verb, url, headers, data, _ = await self._client.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params={"Accept": "application/json", "Content-Type": kind or "application/json"},
            body=body,
            auth_settings=["BearerToken"],
        )
        answer = await self._client.call_api(verb, url, headers, data, _request_timeout=limit)
        response: aiohttp.ClientResponse = answer.response
        if response.status >= 300:
            raise ClusterError(response.status, _message(await response.read()))
        return response


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


def _message(body: bytes) -> str:
    """What a Status object says."""
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
