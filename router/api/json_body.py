"""Request bodies as JSON in the strict sense of RFC 8259: UTF-8, and no NaN or Infinity, which Python would accept."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from barista.errors import InvalidRequest


def parse_json(body: bytes) -> Any:
    """The value of a JSON text. Raises HTTPException (400) that says what is wrong with it."""
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\ud" in text.lower():  # half a surrogate pair is valid JSON, but no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError:
        raise HTTPException(400, "The body holds half a surrogate pair, which is no valid Unicode text.") from None
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"The body is not valid UTF-8 at byte {error.start}.") from None
    except json.JSONDecodeError as error:
        raise HTTPException(400, f"The body is not valid JSON: {error.msg} at character {error.pos}.") from None
    except RecursionError:
        raise HTTPException(400, "The body is nested too deeply.") from None
    except ValueError:
        raise HTTPException(400, "The body is not valid JSON: a number is not finite or has too many digits.") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


class StrictJsonRequest(Request):
    """A request whose JSON is parsed by parse_json."""

    async def json(self) -> Any:
        """The parsed body. Raises HTTPException (400)."""
        return parse_json(await self.body())


class StrictJsonRoute(APIRoute):
    """A route that takes JSON only and hands StrictJsonRequests to FastAPI's body parsing.

    Browsers send other content types across origins without asking, so accepting those would let any web page use a
    server on the same machine.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler behind a stricter request."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if content_type != "application/json":
                raise InvalidRequest("Send JSON, with the header `Content-Type: application/json`.", status=415)
            return await handler(StrictJsonRequest(request.scope, request.receive))

        return strict
