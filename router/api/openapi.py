"""The OpenAPI document: the errors that every route can answer with, and the key that it asks for."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from router.api.errors import ErrorBody

Responses = dict[int | str, dict[str, Any]]


def _errors(*statuses: int) -> Responses:
    return {status: {"model": ErrorBody} for status in statuses}


GET_ERRORS = _errors(400, 401, 404, 405, 421)
POST_ERRORS = _errors(400, 401, 404, 405, 408, 413, 415, 421, 500, 503)
GENERATION_ERRORS = {**POST_ERRORS, **_errors(429)}


POOL_ERRORS = {**POST_ERRORS, **_errors(403, 422)}


UNREADY = _errors(405, 421, 503)
GET_POOL_ERRORS = {**GET_ERRORS, **_errors(500, 503)}
TEXT: dict[str, Any] = {"description": "Prometheus text.", "content": {"text/plain": {"schema": {"type": "string"}}}}
EVENT_STREAM: dict[str, Any] = {
    "description": "The answer, or with `stream` a server-sent event per chunk and `data: [DONE]` as the last.",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


def install_document(app: FastAPI, needs_key: bool) -> None:
    """Make `app` describe itself truly: FastAPI's own 422 is never sent, and with keys every route asks for one."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(describe(), needs_key)
        return describe()

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document


def _complete(schema: dict[str, Any], needs_key: bool) -> None:
    if needs_key:
        schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
    for path in schema["paths"].values():
        for operation in path.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
