"""The Ray cluster under a pool: a local one that ends with this process, or the one at RAY_ADDRESS."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray

from barista.errors import ConfigError

WORKER_RESOURCE = "barista_worker"
LOCAL_WORKERS = 64
OBJECT_STORE_BYTES = 80 << 20  # nothing goes through it; Ray asks for 75 MiB at least
CONNECT_SECONDS = 5.0
JOIN_SECONDS = 15.0


@contextlib.contextmanager
def local_cluster(namespace: str) -> Iterator[None]:
    """A Ray cluster of this machine alone, without a dashboard, that ends with this process.

    In the environment of experts.cluster.environment.
    """
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=1,
            resources={WORKER_RESOURCE: LOCAL_WORKERS},
            object_store_memory=OBJECT_STORE_BYTES,
            **_quiet(namespace),
        )
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def joined_cluster(address: str, namespace: str) -> Iterator[None]:
    """The cluster at `address`, as RAY_ADDRESS has it. Raises ConfigError when it does not answer."""
    remedy = (
        "Start Ray there (ray start --head --resources='{\"barista_worker\": 4}'), correct RAY_ADDRESS, "
        "or unset it to have a local cluster started."
    )
    _require_listener(address, remedy)
    failure = _within(JOIN_SECONDS, lambda: ray.init(address=address, **_quiet(namespace)))
    if failure is not None:
        tokens = " If it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file of its token."
        raise ConfigError(f"No Ray cluster can be joined at RAY_ADDRESS={address}: {failure}", remedy + tokens)
    try:
        yield
    finally:
        ray.shutdown()


def _quiet(namespace: str) -> dict[str, Any]:
    return {"namespace": namespace, "log_to_driver": False, "logging_level": "error"}


def _require_listener(address: str, remedy: str) -> None:
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:  # "auto" and ray:// find their way themselves
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"Nothing answers at RAY_ADDRESS={address}: {error}.", remedy) from error


def _within(seconds: float, work: Callable[[], object]) -> str | None:
    """Why the work failed, or None. Ray retries for minutes, so that it is left behind when the time is over."""
    failure: list[str] = [f"no answer within {seconds:.0f} seconds."]

    def attempt() -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001  # whatever Ray raises is the answer
            failure[0] = str(error) or type(error).__name__
        else:
            failure.clear()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return failure[0] if failure else None
