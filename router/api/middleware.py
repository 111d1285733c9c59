"""What stands before every route, as plain ASGI (a wrapper that buffers would break streams and disconnects).

Outside in: the host (without keys), keys, then the body. A request that fails here costs no parsing.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from barista.errors import InvalidRequest, RequestError
from router.api.errors import error_response
from router.api.settings import ApiSettings
from router.loopback import is_loopback

OPEN_PATHS = frozenset({"/health", "/live", "/ready"})


HOST = re.compile(r"(?:\[([^\]]*)\]|([^:]*))(?::\d*)?")  # RFC 9110, section 7.2: an address or a name, and a port


class CheckHost:
    """Answers only to names of this machine, for a server without keys, which listens on loopback.

    A web page whose own name is made to resolve to 127.0.0.1 (DNS rebinding) is of the server's origin to a browser,
    so nothing else keeps it out; but the browser sends that name as Host.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on or answer 421 (ASGI)."""
        if scope["type"] == "http" and not _names_this_machine(Headers(scope=scope).get("host", "")):
            error = InvalidRequest(
                "Without API keys this server answers to localhost and 127.0.0.1 only. Use such an address, or start "
                "the server with --api-key-file.",
                status=421,
                code="wrong_host",
            )
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _names_this_machine(host: str) -> bool:
    match = HOST.fullmatch(host)
    return match is not None and is_loopback(match[1] or match[2] or "")


class RequireKey:
    """Default deny: once API keys are configured, everything but OPEN_PATHS needs one, or an admin key.

    Puts the key's sha256 digest, or b"" for a caller who needs none, into scope["barista.key"].
    """

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on or answer 401 (ASGI)."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            scope["barista.key"] = key = caller_key(headers.get("authorization", ""), self._settings)
            if self._settings.api_keys and not key and scope["path"] not in OPEN_PATHS:
                await error_response(no_key())(scope, receive, send)
                return
        await self._app(scope, receive, send)


def caller_key(authorization: str, settings: ApiSettings) -> bytes:
    """The digest of the caller's key, b"" if it is not known. authorization: as the caller sent it, or "".

    All are compared, each in constant time, so time tells nothing.
    """
    scheme, _, key = authorization.partition(" ")
    digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
    matches = [known for known in settings.api_keys + settings.admin_keys if hmac.compare_digest(known, digest)]
    return matches[0] if matches and scheme.lower() == "bearer" else b""


def no_key() -> InvalidRequest:
    """The answer to a caller without a key who needs one."""
    return InvalidRequest(
        "A valid API key is needed, as `Authorization: Bearer KEY`.", status=401, code="invalid_api_key"
    )


class ReadBody:
    """Reads the whole body within its bounds before the application starts.

    Answers 413 above max_body_bytes and 408 after body_timeout seconds.
    """

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on with a body that is there, or answer (ASGI)."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            self._check_length(Headers(scope=scope))
            async with asyncio.timeout(self._settings.body_timeout):
                body = await self._read(receive)
        except TimeoutError:
            error: RequestError = InvalidRequest("The body took too long to arrive.", status=408)
            await error_response(error)(scope, receive, send)
        except RequestError as error:
            await error_response(error)(scope, receive, send)
        else:
            if body is not None:
                await self._app(scope, _replay(body, receive), send)

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._settings.max_body_bytes:
            raise self._too_large()

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None if the client left before its end."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._settings.max_body_bytes:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> InvalidRequest:
        limit = self._settings.max_body_bytes
        return InvalidRequest(f"The body is larger than {limit} bytes.", status=413, code="body_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, then whatever comes after it."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
