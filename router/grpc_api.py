"""barista.v1.Router: the API over gRPC. A request becomes the body that HTTP takes; from there on they are the same.

Nothing here looks at the name by which a caller knows this host, as HTTP does: no web page can make a browser speak
HTTP/2 without TLS.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import aclosing, suppress
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse
from grpc_health.v1.health_pb2_grpc import HealthServicer, add_HealthServicer_to_server
from pydantic import ValidationError

from barista.addresses import join
from barista.errors import ConfigError, InvalidRequest, RequestError
from barista.v1 import router_pb2 as pb
from barista.v1.router_pb2_grpc import RouterServicer, add_RouterServicer_to_server
from router.announce import reachable
from router.api.answers import shown_logprob
from router.api.chat import chat_generation
from router.api.choice import Delta
from router.api.completions import completion_generation
from router.api.errors import engine_failed, validation_error
from router.api.generation import Generation
from router.api.middleware import caller_key, no_key
from router.api.schemas import ChatCompletionRequest, CompletionRequest
from router.api.service import Service
from router.messages import Token

HEALTH_NAMES = ("", "barista.v1.Router")
HEALTH_SECONDS = 1.0
STATUSES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}

log = logging.getLogger(__name__)


class GrpcApi:
    """The server. port: 0 takes a free one. address: host:port as seen from this machine, once it has started."""

    def __init__(self, service: Service, port: int) -> None:
        self._service = service
        self._port = port
        self.address = ""

    async def start(self, host: str) -> None:
        """Listen on an IP address. Raises ConfigError if the port cannot be had."""
        options = (
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", self._service.settings.max_body_bytes),
            # A client whose host has vanished closes no connection.
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
        )
        self._server = grpc.aio.server(options=options)
        self._health = Health(self._service)
        add_RouterServicer_to_server(RouterService(self._service), self._server)
        add_HealthServicer_to_server(self._health, self._server)
        try:
            port = self._server.add_insecure_port(join(host, self._port))
        except RuntimeError as error:
            raise ConfigError(
                f"Cannot listen on {host}, port {self._port}, for gRPC.",
                "Stop what listens there, or choose another with --grpc-port.",
            ) from error
        await self._server.start()
        self.address = reachable(host, port)

    async def stop(self, seconds: float) -> None:
        """Take no call; open ones have so long to end."""
        self._health.stop()
        await self._server.stop(seconds)


class RouterService(RouterServicer):  # type: ignore[misc]  # generated without types
    """The calls."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        # Not a generator, which grpc would leave open at its last token when the client goes.
        try:
            await self._answer(request, context)
            return
        except RequestError as error:
            failure = error
        except asyncio.CancelledError:
            self._service.metrics.client_disconnected()
            raise
        except Exception as error:
            log.exception("unhandled %s in a call", type(error).__name__)
            failure = engine_failed("internal")
        await context.abort(status_of(failure), str(failure), _trailing_metadata(failure))

    async def _answer(self, request: pb.GenerateRequest, context: Any) -> None:
        settings = self._service.settings
        key = caller_key(_authorization(context), settings)
        if settings.api_keys and not key:
            raise no_key()
        generation = _generation(self._service, key, request)
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                await context.write(_reply(delta, generation))


class Health(HealthServicer):  # type: ignore[misc]
    """SERVING exactly while GET /ready answers 200."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """End every Watch."""
        self._stopping.set()

    async def Check(self, request: HealthCheckRequest, context: Any) -> HealthCheckResponse:
        if request.service not in HEALTH_NAMES:
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such service.")
        return await self._status()

    async def List(self, request: HealthListRequest, context: Any) -> HealthListResponse:
        status = await self._status()
        return HealthListResponse(statuses=dict.fromkeys(HEALTH_NAMES, status))

    async def Watch(self, request: HealthCheckRequest, context: Any) -> None:
        known = request.service in HEALTH_NAMES
        told = None
        while not self._stopping.is_set():
            status = await self._status() if known else _SERVICE_UNKNOWN
            if status != told:
                told = status
                await context.write(status)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), HEALTH_SECONDS)

    async def _status(self) -> HealthCheckResponse:
        try:
            await self._service.require_ready()
        except RequestError:
            return HealthCheckResponse(status=HealthCheckResponse.NOT_SERVING)
        return HealthCheckResponse(status=HealthCheckResponse.SERVING)


_SERVICE_UNKNOWN = HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN)


def status_of(error: RequestError) -> grpc.StatusCode:
    """gRPC's status for an HTTP status."""
    other = grpc.StatusCode.INVALID_ARGUMENT if error.status < 500 else grpc.StatusCode.INTERNAL
    return STATUSES.get(error.status, other)


def _trailing_metadata(error: RequestError) -> tuple[tuple[str, str], ...]:
    code = ("barista-code", error.code or error.type)
    return (code,) if error.retry_after is None else (code, ("retry-after", str(error.retry_after)))


def _authorization(context: Any) -> str:
    return next((value for name, value in context.invocation_metadata() or () if name == "authorization"), "")


def _generation(service: Service, key: bytes, request: pb.GenerateRequest) -> Generation:
    body = body_of(request)
    if isinstance(body, ChatCompletionRequest):
        return chat_generation(service, key, body)
    return completion_generation(service, key, body)


def body_of(request: pb.GenerateRequest) -> ChatCompletionRequest | CompletionRequest:
    """The body of the HTTP request that asks for the same. Raises InvalidRequest."""
    fields = _fields(request)
    chat, token_ids = fields.pop("chat", None), fields.pop("token_ids", None)
    try:
        if chat is None:
            prompt = {} if token_ids is None else {"prompt": token_ids.get("ids", [])}
            return CompletionRequest.model_validate(fields | prompt)
        if "logprobs" in fields:
            fields |= {"logprobs": True, "top_logprobs": fields["logprobs"]}
        return ChatCompletionRequest.model_validate(fields | chat)
    except ValidationError as error:
        raise validation_error(error.errors()) from None


def _fields(message: Message) -> dict[str, Any]:
    """What was set in a message, as JSON has it. Raises InvalidRequest for a field that only a newer version knows."""
    for unknown in UnknownFieldSet(message):
        raise InvalidRequest(
            f"Unknown parameter: field {unknown.field_number} of {message.DESCRIPTOR.name}", code="unknown_parameter"
        )
    return {field.name: _value(value) for field, value in message.ListFields()}


def _value(value: Any) -> Any:
    match value:
        case bool() | int() | float() | str():
            return value
        case Message():
            return _fields(value)
        case Mapping():
            return {str(key): item for key, item in value.items()}
        case _:
            return [_value(item) for item in value]


def _reply(delta: Delta, generation: Generation) -> pb.GenerateReply:
    reply = pb.GenerateReply(text=delta.text, token_ids=[delta.token.token_id])
    if generation.logprobs is not None:
        reply.logprobs.append(_logprobs(delta.token))
    if delta.finish_reason is not None:
        reply.finish_reason = delta.finish_reason
        reply.usage.CopyFrom(_usage(generation))
    return reply


def _logprobs(token: Token) -> pb.TokenLogprobs:
    top = [pb.TopLogprob(token_id=other, logprob=shown_logprob(logprob)) for other, logprob in token.top_logprobs]
    return pb.TokenLogprobs(logprob=shown_logprob(token.logprob), top_logprobs=top)


def _usage(generation: Generation) -> pb.Usage:
    usage = generation.usage()
    return pb.Usage(
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        total_tokens=usage["total_tokens"],
        cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
    )
