"""Every error leaves in OpenAI's shape: {"error": {"message", "type", "param", "code"}}.

Messages name what the client sent wrong, shortened, and never what the server holds: no internals, no prompts.
The openai client retries every status from 500 up unless `x-should-retry: false` forbids it, so a plain 500 does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from barista.errors import EngineFailed, InvalidRequest, NotFound, RequestError

MAX_VALIDATION_ERRORS = 10
MAX_ERROR_CHARS = 200

log = logging.getLogger(__name__)


class ErrorDetail(TypedDict):
    """The fields of OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """What a failed request is answered with."""

    error: ErrorDetail


# `Failed.code` of the engine -> what the client is told. The engine's own message stays inside.
ENGINE_FAILURES: Mapping[str, Callable[[], RequestError]] = {
    "engine_dead": lambda: EngineFailed(
        "The engine stopped while it served this request. Send it again.", status=503, retry_after=5
    ),
    "context_length_exceeded": lambda: InvalidRequest("The prompt and its answer do not fit the context."),
    "invalid_request": lambda: InvalidRequest("The engine refused this request."),
    "nonfinite": lambda: EngineFailed("The model computed a value that is not finite for this request."),
    "expert_unavailable": lambda: EngineFailed(
        "No worker that can be reached now holds an expert that this request needs. Send it again in a while.",
        status=503,
        retry_after=5,
    ),
    "internal": lambda: EngineFailed("The server failed to finish this request."),
}


def engine_failed(code: str) -> RequestError:
    """The error for a `Failed.code`; an unknown code counts as internal."""
    code = code if code in ENGINE_FAILURES else "internal"
    error = ENGINE_FAILURES[code]()
    error.code = code
    return error


def error_detail(error: RequestError) -> ErrorDetail:
    """The error object of one failure."""
    return {"message": str(error), "type": error.type, "param": error.param, "code": error.code}


def error_event(error: RequestError) -> bytes:
    """The event that ends a failed stream; no [DONE] follows it."""
    detail = {"message": str(error), "type": error.type, "code": error.code}
    return b"data: " + encode_json({"error": detail}) + b"\n\n"


def error_response(error: RequestError, headers: Mapping[str, str] | None = None) -> Response:
    """The HTTP answer of one failure."""
    extra = dict(headers or {})
    if error.retry_after is not None:
        extra["retry-after"] = str(error.retry_after)
    if error.status == 500:
        extra["x-should-retry"] = "false"
    if error.status == 401:
        extra["www-authenticate"] = "Bearer"
    body = encode_json({"error": error_detail(error)})
    return Response(body, status_code=error.status, headers=extra, media_type="application/json")


def encode_json(value: object) -> bytes:
    """JSON in UTF-8."""
    return msgspec.json.encode(value)


def printable(text: str) -> str:
    """Client text that is safe to echo: valid UTF-8, at most MAX_ERROR_CHARS characters."""
    return text.encode("utf-8", "replace").decode()[:MAX_ERROR_CHARS]


def validation_error(errors: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    """pydantic's findings as one InvalidRequest: the first ten, 200 characters each.

    A body of a few kilobytes can break thousands of rules; the answer must not be larger than the question.
    """
    places = [".".join(str(part) for part in error["loc"] if part != "body") for error in errors]
    messages = [
        printable(f"{place}: {error['msg']}" if place else str(error["msg"]))
        for place, error in zip(places, errors[:MAX_VALIDATION_ERRORS], strict=False)
    ]
    # A rule of our own about the whole body names its field in `ctx`.
    param = places[0].partition(".")[0] or errors[0].get("ctx", {}).get("param", "")
    return InvalidRequest("; ".join(messages), param=printable(param) or None, code=own_code(errors[0]))


def own_code(error: Mapping[str, Any]) -> str | None:
    """The error code of a rule that router.api.schemas states itself."""
    return str(error["type"]) if error["type"] in ("unsupported_parameter", "unknown_parameter") else None


def http_error(error: HTTPException) -> RequestError:
    """The framework's own refusals: an unknown path, a wrong method, an unreadable body."""
    if error.status_code == 404:
        return NotFound("There is nothing at this path.", code="not_found")
    return InvalidRequest(str(error.detail), status=error.status_code)


def install_error_handlers(app: FastAPI) -> None:
    """Make every exception of `app` leave in OpenAI's shape."""

    @app.exception_handler(RequestError)
    async def on_request_error(_: Request, error: RequestError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(_: Request, error: RequestValidationError) -> Response:
        return error_response(validation_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> Response:
        return error_response(http_error(error), error.headers)

    @app.exception_handler(Exception)
    async def on_bug(_: Request, error: Exception) -> Response:
        log.error("unhandled %s in a request", type(error).__name__)
        return error_response(engine_failed("internal"))
