"""Who may speak to whom inside a pool: a deployment token on every call and, if asked for, mutual TLS.

With a TLS folder both ends show a certificate, and each accepts only what `ca.pem` has signed. Addresses in a pool come
and go, so a client checks the server's certificate against one fixed name: every certificate must carry
`barista.internal` as a DNS subject alternative name. For example:

    openssl req -x509 -newkey rsa:2048 -nodes -days 365 -subj /CN=barista-ca -keyout ca.key -out ca.pem
    openssl req -newkey rsa:2048 -nodes -subj /CN=barista -keyout key.pem -out cert.csr
    printf subjectAltName=DNS:barista.internal > san.ext
    openssl x509 -req -in cert.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 365 -extfile san.ext -out cert.pem
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc

from barista.errors import ConfigError

TLS_NAME = "barista.internal"
MAX_MESSAGE_BYTES = 4 << 20
TOKEN_VARIABLE = "BARISTA_POOL_TOKEN"  # the name of a variable, not a token

_BOTH_ENDS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A host that vanishes closes no connection: both ends ask, and give up on a peer after 10 s of silence.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
_CLIENT = (
    *_BOTH_ENDS,
    ("grpc.enable_http_proxy", 0),
    # A channel of its own to each peer: no other channel's failures and waits to reconnect.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.ssl_target_name_override", TLS_NAME),
)
SERVER_OPTIONS = (
    *_BOTH_ENDS,
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.so_reuseport", 0),
)


def deployment_token(environ: Mapping[str, str]) -> str:
    """The token that all parts of a deployment share. Raises ConfigError where it is not set."""
    token = environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise ConfigError(
            f"{TOKEN_VARIABLE} is not set; engines and their APIs know each other by it.",
            f"Set it to the same secret for all of them: export {TOKEN_VARIABLE}=$(openssl rand -hex 32)",
        )
    return token


class Trust:
    """The token of one deployment and, with a folder, its certificates.

    token: not empty. tls_dir: folder of ca.pem, cert.pem and key.pem; None: connections are not encrypted.
    Raises ConfigError for an empty token or a file that cannot be read.
    """

    def __init__(self, token: str, tls_dir: Path | None = None) -> None:
        if not token:
            raise ConfigError("The pool's token is empty.", f"Set {TOKEN_VARIABLE}.")
        self.metadata = (("authorization", f"Bearer {token}"),)  # for every call that a client makes
        self.tls_dir = tls_dir
        self._client: grpc.ChannelCredentials | None = None
        self._server: grpc.ServerCredentials | None = None
        if tls_dir is not None:
            ca, cert, key = (_read(tls_dir / name) for name in ("ca.pem", "cert.pem", "key.pem"))
            self._client = grpc.ssl_channel_credentials(ca, key, cert)
            self._server = grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True)

    def channel(self, address: str) -> grpc.Channel:
        """A channel to host:port. Calls on it pass `metadata=trust.metadata`."""
        if self._client is None:
            return grpc.insecure_channel(address, _CLIENT)
        return grpc.secure_channel(address, self._client, _CLIENT)

    def aio_channel(self, address: str) -> grpc.aio.Channel:
        """As `channel`, for asyncio."""
        if self._client is None:
            return grpc.aio.insecure_channel(address, _CLIENT)
        return grpc.aio.secure_channel(address, self._client, _CLIENT)

    def add_port(self, server: grpc.Server | grpc.aio.Server, address: str) -> int:
        """Let a server of either kind listen on host:port (port 0: a free one). Returns the port.

        Raises ConfigError when the address cannot be had, or the certificates cannot be used.
        """
        try:
            if self._server is None:
                port: int = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, self._server)
        except RuntimeError as error:
            raise ConfigError(
                f"Cannot listen on {address}: {error}.", "Give another address, or check the certificates."
            ) from error
        return port

    def interceptor(self) -> grpc.ServerInterceptor:
        """For grpc.server: ends every call without the token with UNAUTHENTICATED."""
        return _Interceptor(self)

    def aio_interceptor(self) -> grpc.aio.ServerInterceptor:
        """As `interceptor`, for grpc.aio.server."""
        return _AioInterceptor(self)

    def accepts(self, metadata: Any) -> bool:
        """Whether a call's metadata carries the token; compared in constant time."""
        ((_, wanted),) = self.metadata
        given = [value for key, value in metadata or () if key == "authorization"]
        return len(given) == 1 and hmac.compare_digest(str(given[0]).encode(), wanted.encode())


def with_remedy(reason: str) -> str:
    """Why a call in a pool has failed, in gRPC's words, and what would help where it was for want of trust."""
    words = reason.lower()
    if "handshake" in words or "certificate" in words:
        return f"{reason.rstrip('.')}. {_CERTIFICATE_REMEDY}"
    return reason


_CERTIFICATE_REMEDY = (
    f"Both ends need --tls-dir, with certificates for the DNS name {TLS_NAME} that the same ca.pem has signed."
)
_REFUSAL = (
    f"The deployment token is missing or wrong. Give both ends the token of the same pool ({TOKEN_VARIABLE} of a "
    "worker that is started by hand), or restart whatever belongs to an earlier pool."
)


class _Interceptor(grpc.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    def __init__(self, trust: Trust) -> None:
        self._trust = trust

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        if self._trust.accepts(handler_call_details.invocation_metadata):
            return continuation(handler_call_details)
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, _REFUSAL)
        )


class _AioInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    def __init__(self, trust: Trust) -> None:
        self._trust = trust

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        if self._trust.accepts(handler_call_details.invocation_metadata):
            return await continuation(handler_call_details)

        async def refuse(request: Any, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, _REFUSAL)

        return grpc.unary_unary_rpc_method_handler(refuse)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"Cannot read {file}: {error.strerror}.", "--tls-dir is a folder of ca.pem, cert.pem and key.pem."
        ) from error
