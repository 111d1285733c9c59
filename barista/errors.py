"""What can go wrong, as one tree.

BaristaError                  message + remedy; the CLI prints it and exits 1
|-- ConfigError               a flag, an environment variable or a key of the TOML file
|-- CheckpointError           a model's files: missing, truncated, lying, unknown architecture
|-- CacheError                the cache folder: no space, not writable
`-- RequestError              one request; carries the HTTP status and OpenAI's error type and code
    |-- InvalidRequest        400: the client must change the request
    |-- NotFound              404: an unknown model
    |-- Overloaded            429 or 503 with Retry-After: the same request may succeed later
    `-- EngineFailed          500 or 503: ours, not the client's
"""

from __future__ import annotations


class BaristaError(Exception):
    """Something the user can act on: `message` says what is wrong and names the value, `remedy` what to do."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message} {remedy}".strip())
        self.message = message
        self.remedy = remedy


class ConfigError(BaristaError):
    """A bad flag, environment variable or key in the configuration file."""


class CheckpointError(BaristaError):
    """A model's files cannot be used. The message names the file, and the tensor where there is one."""


class CacheError(BaristaError):
    """The cache folder cannot take what must be written there."""


class RequestError(BaristaError):
    """One request fails; no other is disturbed.

    status: HTTP status. type, code: the fields of OpenAI's error object. param: the offending field, if there is one.
    retry_after: seconds, or None.
    """

    status = 500
    type = "server_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        status: int | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.status = type(self).status if status is None else status
        self.retry_after = retry_after


class InvalidRequest(RequestError):
    """400: the request can never succeed as it is."""

    status = 400
    type = "invalid_request_error"


class NotFound(RequestError):
    """404: no such model or path."""

    status = 404
    type = "invalid_request_error"


class Overloaded(RequestError):
    """503 (the server is full) or 429 (this key is over its share); the same request may succeed later."""

    status = 503
    type = "overloaded_error"


class EngineFailed(RequestError):
    """The engine could not finish this request."""

    status = 500
    type = "server_error"
