"""Talking to a running server from the command line: one connection, and failures as errors with a remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Self

import httpx

from barista.errors import BaristaError

CONNECT_SECONDS = 10.0
MAX_WORDS = 300  # characters of an answer that has not OpenAI's shape


class ServerClient:
    """One server; a context manager, which closes its connections. url: with or without /v1.

    read_seconds: how long an answer may take; None: for ever.
    """

    def __init__(self, url: str, api_key: str | None = None, read_seconds: float | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # Not the environment's proxies: they would stand between a terminal and a server on loopback.
        timeout = httpx.Timeout(CONNECT_SECONDS, read=read_seconds)
        with as_barista_error(self.url):
            self.http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def model(self) -> str:
        """The id of the first model that the server serves. Raises BaristaError."""
        with as_barista_error(self.url):
            return str(self.get("/v1/models")["data"][0]["id"])

    def get(self, path: str) -> Any:
        """The JSON at `path`. Raises BaristaError with the server's own words when it refuses or fails."""
        with as_barista_error(self.url):
            return _json(self.http.get(path))

    def post(self, path: str, body: object) -> Any:
        """The JSON that answers `body`. Raises as get."""
        with as_barista_error(self.url):
            return _json(self.http.post(path, json=body))


@contextlib.contextmanager
def as_barista_error(url: str) -> Iterator[None]:
    """Turn the failures of a connection, and answers that are not this API's, into BaristaError."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise BaristaError(f"Cannot talk to {url}: {error}.", "Is the server running there?") from error
    except (ValueError, LookupError, TypeError) as error:
        raise BaristaError(f"{url} does not answer as an OpenAI server does.", "Check --url.") from error


def require_ok(response: httpx.Response) -> None:
    """Raise BaristaError with the server's own words unless it answered 200. The body must have been read."""
    if response.status_code != httpx.codes.OK:
        raise refusal(response)


def refusal(response: httpx.Response) -> BaristaError:
    """An answer other than 200 as an error, in the server's own words."""
    return BaristaError(_message(response), _remedy(response.status_code))


def _json(response: httpx.Response) -> Any:
    require_ok(response)
    return response.json()


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        words = f": {response.text.strip()[:MAX_WORDS]}" if response.text.strip() else "."
        return f"The server answered {response.status_code} {response.reason_phrase}{words}"


def _remedy(status: int) -> str:
    if status == httpx.codes.UNAUTHORIZED:
        return "Give the key with --api-key or BARISTA_API_KEY."
    return "Try again in a moment." if status in (429, 503) else ""
