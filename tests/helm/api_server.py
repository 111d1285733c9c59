"""A small Kubernetes API server: enough of the real one for Helm and for the official Python client.

It runs in a thread, on loopback, and keeps everything in memory. What tests do to it: see the methods of `ApiServer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

from tests.helm.api_controllers import BY_KIND, Controllers, admit
from tests.helm.api_protobuf import MAGIC, decode
from tests.helm.api_store import RESOURCES, ApiError, Change, Key, Object, Resource, Store, matcher

VERSION = "1.33"
BOOKMARK_SECONDS = 0.5
# Of /openapi/v2: a document that says `swagger: 2.0` and nothing else.
NO_SCHEMAS = b"\n\x032.0"
PROTOBUF_SCHEMAS = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"
READ_VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


@dataclass(frozen=True)
class Request:
    """What RBAC sees of a request. resource: with its subresource, as in a Role's rules: "pods/status"."""

    verb: str
    group: str
    resource: str
    namespace: str
    name: str
    token: str = ""  # Helm sends none without TLS


@dataclass(frozen=True)
class Tls:
    """Files of a certificate for the address that is served, its key, and the authority that clients are to trust."""

    certificate: Path
    key: Path
    authority: Path


class ApiServer:
    """groups: those served beside the built-in ones, such as "ray.io". token: the one that must be shown, if any."""

    def __init__(
        self, groups: tuple[str, ...] = (), host: str = "127.0.0.1", tls: Tls | None = None, token: str = ""
    ) -> None:
        self.host = host
        self._tls = tls
        self._token = token
        self.store = Store(admit=admit)
        self.store.changed = self._changed
        self.controllers = Controllers(self.store)
        self.requests: list[Request] = []
        self.silent_watches = False  # they are accepted and hear nothing, not even their end
        self._served = [resource for resource in RESOURCES if resource.built_in or resource.group in groups]
        self._denied: Callable[[Request], bool] = lambda request: False
        self._before_patch: list[Callable[[], object]] = []
        self._failures: list[tuple[Callable[[Request], bool], int]] = []
        self._changes: list[Change] = []
        self._reacting = False
        self._watches: dict[asyncio.Event, web.BaseRequest] = {}
        self.port = 0
        for name in ("default", "kube-system"):
            self.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})

    # What tests do before and after.

    def start(self) -> None:
        """Serve, on the same port as before if there was one."""
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), name="api-server")
        self._thread.start()
        started.wait()

    def stop(self) -> None:
        """Break every connection and refuse new ones; the objects stay."""
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"{'http' if self._tls is None else 'https'}://{self.host}:{self.port}"

    def write_kubeconfig(self, path: Path, namespace: str = "default") -> Path:
        """A kubeconfig for this server."""
        trust = {} if self._tls is None else {"certificate-authority": str(self._tls.authority)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": self.url, **trust}}],
            "users": [{"name": "test", "user": {"token": self._token or "test"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}],
            "current-context": "test",
        }
        path.write_text(yaml.safe_dump(config))
        return path

    # What tests do to the objects.

    def put(self, item: Object) -> Object:
        """Create the object, or replace it, its status included."""
        resource = _kind(item)
        metadata = item["metadata"]
        key = resource, metadata.get("namespace", "default") if resource.namespaced else "", metadata["name"]
        with self.store.lock:
            if key not in self.store.objects:
                return self.store.create(resource, key[1], item, "test", with_status=True)
            self.store.replace(key, item, "test")
            if "status" in item and "status" in resource.subresources:
                self.store.replace(key, self.store.get(*key) | {"status": item["status"]}, "test", "status")
            return self.store.get(*key)

    def get(self, kind: str, name: str, namespace: str = "default") -> Object:
        """kind: such as "Pod" or "RayCluster". Raises ApiError."""
        return self.store.get(_named(kind), namespace, name)

    def all(self, kind: str, namespace: str = "") -> list[Object]:
        """Every object of a kind, of one namespace or of all."""
        return self.store.list(_named(kind), namespace, lambda item: True)

    def delete(self, kind: str, name: str, namespace: str = "default", *, unheard: bool = False) -> None:
        """Delete; unheard: no watch will ever say so, as if its connection had been broken just then."""
        self.store.delete((_named(kind), namespace, name), in_history=not unheard)

    # What goes wrong.

    def drop_watches(self) -> None:
        """Break the connections of every watch."""
        self._loop.call_soon_threadsafe(self._drop_watches)

    def forget_history(self) -> None:
        """Every resource version that clients know is Gone (410) from now on."""
        self.store.forget_history()
        self.drop_watches()

    def before_next_patch(self, act: Callable[[], object]) -> None:
        """Somebody else does this between the client's read and its next patch."""
        self._before_patch.append(act)

    def fail_next(self, code: int, of: Callable[[Request], bool] = lambda request: True) -> None:
        """Answer the next such request with this status."""
        self._failures.append((of, code))

    def deny(self, denied: Callable[[Request], bool]) -> None:
        """Answer such requests with 403, as RBAC does."""
        self._denied = denied

    def require_token(self, token: str) -> None:
        """Only this bearer token is good from now on."""
        self._token = token

    def watching(self) -> int:
        """How many watches are open."""
        return len(self._watches)

    # Serving.

    async def _serve(self, started: threading.Event) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.05, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, self.host, self.port, reuse_address=True, ssl_context=self._ssl_context())
        await site.start()
        self.port = runner.addresses[0][1]
        started.set()
        await self._stopped.wait()
        self._drop_watches()
        await runner.cleanup()

    def _ssl_context(self) -> ssl.SSLContext | None:
        if self._tls is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self._tls.certificate, self._tls.key)
        return context

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        try:
            if self._token and _token(request) != self._token:
                raise ApiError(401, "Unauthorized", "Unauthorized")
            return await self._route(request)
        except ApiError as error:
            return _status(error)

    async def _route(self, request: web.Request) -> web.StreamResponse:
        parts = [part for part in request.path.split("/") if part]
        match parts:
            case ["version"]:
                return web.json_response({"major": "1", "minor": VERSION[2:], "gitVersion": f"v{VERSION}.0"})
            case ["openapi", "v2"]:
                return web.Response(body=NO_SCHEMAS, headers={"Content-Type": PROTOBUF_SCHEMAS})
            case ["api"]:
                return web.json_response({"kind": "APIVersions", "versions": ["v1"]})
            case ["apis"]:
                return web.json_response({"kind": "APIGroupList", "apiVersion": "v1", "groups": self._groups()})
            case ["api", version]:
                return web.json_response(self._resources("", version))
            case ["apis", group, version]:
                return web.json_response(self._resources(group, version))
            case ["api", version, *rest]:
                return await self._resource(request, "", version, rest)
            case ["apis", group, version, *rest]:
                return await self._resource(request, group, version, rest)
        raise ApiError(404, "NotFound", f"the server could not find {request.path}")

    def _groups(self) -> list[Object]:
        versions = {resource.group: resource.version for resource in self._served if resource.group}
        found = []
        for group, version in versions.items():
            only = {"groupVersion": f"{group}/{version}", "version": version}
            found.append({"name": group, "versions": [only], "preferredVersion": only})
        return found

    def _resources(self, group: str, version: str) -> Object:
        listed = []
        for resource in self._served:
            if (resource.group, resource.version) == (group, version):
                about = {"namespaced": resource.namespaced, "kind": resource.kind, "singularName": ""}
                verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
                listed.append({"name": resource.plural, "verbs": verbs, **about})
                for part in resource.subresources:
                    listed.append({"name": f"{resource.plural}/{part}", "verbs": ["get", "patch", "update"], **about})
        if not listed:
            raise ApiError(404, "NotFound", f"the server does not serve {group}/{version}")
        group_version = f"{group}/{version}" if group else version
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": listed}

    async def _resource(self, request: web.Request, group: str, version: str, rest: list[str]) -> web.StreamResponse:
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        plural, name, subresource = [*rest, "", ""][:3]
        wanted = (group, version, plural)
        resource = next((one for one in self._served if (one.group, one.version, one.plural) == wanted), None)
        if resource is None or (subresource and subresource not in resource.subresources):
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        if not resource.namespaced and plural != "namespaces":
            namespace = ""
        watched = request.query.get("watch") in ("1", "true")
        verb = READ_VERBS[request.method] if name or request.method == "POST" else "watch" if watched else "list"
        path = f"{plural}/{subresource}" if subresource else plural
        self._guard(Request(verb, group, path, namespace, name, _token(request)))
        if verb == "watch":
            return await self._watch(request, resource, namespace)
        body = _body(request, await request.read())
        if verb == "patch":
            while self._before_patch:
                self._before_patch.pop(0)()
        answer = self._do(verb, (resource, namespace, name), subresource, body, request)
        return web.json_response(answer, status=201 if verb == "create" else 200)

    def _guard(self, request: Request) -> None:
        self.requests.append(request)
        if self._denied(request):
            what = f'cannot {request.verb} resource "{request.resource}" in API group "{request.group}"'
            raise ApiError(403, "Forbidden", f'"{request.name}" is forbidden: User "test" {what}')
        for of, code in self._failures:
            if of(request):
                self._failures.remove((of, code))
                raise ApiError(code, "InternalError" if code >= 500 else "Invalid", "injected by the test")

    def _do(self, verb: str, key: Key, subresource: str, body: Any, request: web.Request) -> Object:
        resource, namespace, _ = key
        query = request.query
        dry = query.get("dryRun") == "All"
        manager = query.get("fieldManager") or request.headers.get("User-Agent", "").partition("/")[0]
        match verb:
            case "list":
                items = self.store.list(resource, namespace, _matcher(request))
                metadata = {"resourceVersion": str(self.store.revision)}
                return {"kind": f"{resource.kind}List", "apiVersion": resource.api_version} | {
                    "metadata": metadata,
                    "items": items,
                }
            case "get" if subresource == "scale":
                return _scale(self.store.get(*key))
            case "get":
                return self.store.get(*key)
            case "create":
                return self.store.create(resource, namespace, body, manager, dry)
            case "update" | "patch" if subresource == "scale":
                return self._rescale(key, verb, body, manager, request.content_type)
            case "update":
                return self.store.replace(key, body, manager, subresource, dry)
            case "patch":
                force = query.get("force") == "true"
                return self.store.patch(key, request.content_type, body, manager, subresource, force, dry)
            case "delete":
                return self.store.delete(key, preconditions=(body or {}).get("preconditions"))
        raise ApiError(405, "MethodNotAllowed", verb)

    def _rescale(self, key: Key, verb: str, body: Any, manager: str, how: str) -> Object:
        """/scale: only `spec.replicas` and the resource version count."""
        from tests.helm.api_patch import PatchError, json_patch, merge_patch

        with self.store.lock:
            item = self.store.get(*key)
            try:
                patched = json_patch if how == "application/json-patch+json" else merge_patch
                scale = body if verb == "update" else patched(_scale(item), body)
            except PatchError as error:
                raise ApiError(422, "Invalid", str(error)) from error
            version = scale["metadata"].get("resourceVersion", item["metadata"]["resourceVersion"])
            new = item | {"spec": item["spec"] | {"replicas": scale["spec"]["replicas"]}}
            new["metadata"] = item["metadata"] | {"resourceVersion": version}
            return _scale(self.store.replace(key, new, manager))

    # Watching.

    async def _watch(self, request: web.Request, resource: Resource, namespace: str) -> web.StreamResponse:
        matches = _matcher(request)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        ending = time.monotonic() + float(request.query.get("timeoutSeconds", 3600))
        at = int(request.query.get("resourceVersion") or 0)
        wake = asyncio.Event()
        self._watches[wake] = request
        try:
            await response.prepare(request)
            if at == 0 or request.query.get("sendInitialEvents") == "true":
                at = self.store.revision
                for item in self.store.list(resource, namespace, matches):
                    await _send(response, "ADDED", item)
                await _send(response, "BOOKMARK", _bookmark(resource, at, initial=True))
            while self.silent_watches or time.monotonic() < ending:
                wake.clear()
                if not self.silent_watches:
                    at = await self._send_news(response, resource, namespace, matches, at, request)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(wake.wait(), min(BOOKMARK_SECONDS, max(0.01, ending - time.monotonic())))
        except ApiError as error:
            with contextlib.suppress(ConnectionError):
                await _send(response, "ERROR", _as_status(error))
        except ConnectionError:
            pass
        finally:
            self._watches.pop(wake, None)
        return response

    async def _send_news(
        self,
        response: web.StreamResponse,
        resource: Resource,
        namespace: str,
        matches: Callable[[Object], bool],
        at: int,
        request: web.Request,
    ) -> int:
        changes = self.store.since(at)
        for change in changes:
            at = change.revision
            item = change.after or change.before
            if change.resource != resource or namespace not in ("", item["metadata"].get("namespace", "")):
                continue
            was = change.before is not None and matches(change.before)
            now = change.after is not None and matches(change.after)
            if was or now:
                kind = "MODIFIED" if was and now else "ADDED" if now else "DELETED"
                metadata = item["metadata"] | {"resourceVersion": str(at)}
                await _send(response, kind, item | {"metadata": metadata})
        if not changes and request.query.get("allowWatchBookmarks") == "true":
            await _send(response, "BOOKMARK", _bookmark(resource, at))
        return at

    def _drop_watches(self) -> None:
        for request in self._watches.values():
            if request.transport is not None:
                request.transport.abort()

    def _changed(self, change: Change) -> None:
        """Called by the store, under its lock: let controllers react one change after the other, then wake watches."""
        self._changes.append(change)
        if self._reacting:
            return
        self._reacting = True
        try:
            while self._changes:
                self.controllers.react(self._changes.pop(0))
        finally:
            self._reacting = False
        for wake in list(self._watches):
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(wake.set)


def _token(request: web.Request) -> str:
    return request.headers.get("Authorization", "").partition(" ")[2].strip()


def _kind(item: Object) -> Resource:
    group = item["apiVersion"].rpartition("/")[0]
    return BY_KIND[group, item["kind"]]


def _named(kind: str) -> Resource:
    """Of two that share a name, the newer API's: Events."""
    return next(resource for resource in reversed(RESOURCES) if resource.kind == kind)


def _body(request: web.Request, raw: bytes) -> Any:
    if not raw:
        return None
    if raw.startswith(MAGIC):
        return decode(raw)
    return yaml.safe_load(raw) if "yaml" in request.content_type else json.loads(raw)


def _matcher(request: web.Request) -> Callable[[Object], bool]:
    return matcher(request.query.get("labelSelector", ""), request.query.get("fieldSelector", ""))


def _scale(item: Object) -> Object:
    metadata = {name: item["metadata"][name] for name in ("name", "namespace", "uid", "resourceVersion")}
    replicas = item["spec"].get("replicas", 0)
    about = {"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata}
    return about | {"spec": {"replicas": replicas}, "status": {"replicas": replicas}}


def _bookmark(resource: Resource, at: int, *, initial: bool = False) -> Object:
    metadata: Object = {"resourceVersion": str(at)}
    if initial:
        metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
    return {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata}


def _as_status(error: ApiError) -> Object:
    about = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return about | {"reason": error.reason, "message": error.message, "code": error.code}


def _status(error: ApiError) -> web.Response:
    return web.json_response(_as_status(error), status=error.code)


async def _send(response: web.StreamResponse, kind: str, item: Object) -> None:
    await response.write(json.dumps({"type": kind, "object": item}).encode() + b"\n")
