"""The little that is asked of a Ray cluster over HTTP, at its dashboard: jobs and nodes. No Ray is imported.

Documented in Ray's "Ray Jobs REST API" and "State API"; both ask for the cluster's token where it has one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from barista.errors import ConfigError

logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each look is too many

SECONDS = 10.0
OVER = ("STOPPED", "SUCCEEDED", "FAILED")


@dataclass(frozen=True, slots=True)
class Job:
    """One job. status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED. message: of Ray, for people."""

    submission_id: str
    status: str
    message: str

    @property
    def is_over(self) -> bool:
        """It does not run and will not."""
        return self.status in OVER


class RayApi:
    """The dashboard at `url`, such as http://head:8265. environ: where Ray's own commands find their token.

    Raises ConfigError for what is no URL, and for a token's file that cannot be read. Every call raises ConfigError
    with a remedy when the cluster cannot be reached or refuses.
    """

    def __init__(self, url: str, environ: Mapping[str, str]) -> None:
        if not _is_http_url(url):
            raise ConfigError(f"{url!r} is no URL of a Ray cluster's dashboard.", "Give one such as http://head:8265.")
        self.url = url.rstrip("/")
        token = _token(environ)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    async def jobs(self) -> list[Job]:
        """All jobs that were submitted."""
        answer = await self._ask("GET", "/api/jobs/")
        try:
            return [
                Job(entry["submission_id"], entry["status"], entry.get("message") or "")
                for entry in answer
                if entry.get("submission_id")
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise self._strange(str(answer)) from error

    async def submit(self, submission_id: str, entrypoint: str, env: Mapping[str, str]) -> None:
        """Start a job. env: variables of its processes."""
        body = {"submission_id": submission_id, "entrypoint": entrypoint, "runtime_env": {"env_vars": dict(env)}}
        await self._ask("POST", "/api/jobs/", body)

    async def stop(self, submission_id: str) -> None:
        """Ask a job to end: SIGTERM, and after 3 s SIGKILL."""
        await self._ask("POST", f"/api/jobs/{submission_id}/stop")

    async def logs(self, submission_id: str) -> str:
        """What the job has printed."""
        return str((await self._ask("GET", f"/api/jobs/{submission_id}/logs")).get("logs") or "")

    async def node_addresses(self) -> list[str]:
        """The IP addresses of the nodes that live."""
        answer = await self._ask("GET", "/api/v0/nodes?limit=1000")
        try:
            nodes = answer["data"]["result"]["result"]
            return sorted({node["node_ip"] for node in nodes if node["state"] == "ALIVE"})
        except (KeyError, TypeError) as error:
            raise self._strange(str(answer)) from error

    async def _ask(self, method: str, path: str, body: object = None) -> Any:
        try:
            async with httpx.AsyncClient(headers=self._headers, timeout=SECONDS, trust_env=False) as client:
                answer = await client.request(method, self.url + path, json=body)
        except httpx.HTTPError as error:
            raise ConfigError(
                f"The Ray cluster at {self.url} does not answer: {str(error).rstrip('.') or type(error).__name__}.",
                "Give the address of its dashboard (ray start --dashboard-host=0.0.0.0, port 8265), "
                "and see whether a network policy lets it be reached.",
            ) from error
        if answer.status_code in (401, 403):
            raise ConfigError(
                f"The Ray cluster at {self.url} refuses this token (HTTP {answer.status_code}).",
                "Set RAY_AUTH_TOKEN to the cluster's token.",
            )
        if answer.is_error:
            raise self._strange(f"HTTP {answer.status_code}, {answer.text}")
        try:
            return answer.json()
        except ValueError as error:
            raise self._strange(answer.text) from error

    def _strange(self, text: str) -> ConfigError:
        return ConfigError(
            f"What answers at {self.url} is no dashboard of Ray 2.60, or one in trouble: {text[:300].rstrip('.')}.",
            "Give the address of the Ray cluster's dashboard, and see the head's logs.",
        )


def _token(environ: Mapping[str, str]) -> str:
    """RAY_AUTH_TOKEN, the content of the file RAY_AUTH_TOKEN_PATH, or of the one that Ray makes at home; or empty."""
    if environ.get("RAY_AUTH_TOKEN"):
        return environ["RAY_AUTH_TOKEN"].strip()
    named = environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or f"{environ.get('HOME', '')}/.ray/auth_token")
    if not named and not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(
            f"Cannot read Ray's token in {path}: {error.strerror}.", "Correct RAY_AUTH_TOKEN_PATH."
        ) from error


def _is_http_url(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return url.scheme in ("http", "https") and bool(url.host)
