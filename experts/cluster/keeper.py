"""python -m experts.cluster.keeper FD PARENT: bring up a pool for the server on the inherited socket FD, tell it how
that goes, and take it down when the server is gone. Started by experts.cluster.__main__, whose process PARENT is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from barista.errors import BaristaError, ConfigError
from barista.trust import TOKEN_VARIABLE, Trust
from experts.cluster import messages
from experts.cluster.controller_actor import NAME, ControllerActor
from experts.cluster.deployment import Deployment
from experts.cluster.local import joined_cluster, local_cluster
from experts.cluster.messages import PoolConfig
from experts.cluster.processes import end_with_parent
from experts.cluster.workers import cause_of, package_env

log = logging.getLogger(__name__)

ALIVE_SECONDS = 2.0
CONTROLLER_SECONDS = 30.0  # to start, and to place the workers
FAREWELL_SECONDS = (
    10.0  # after the parent has gone; whatever is not done by then is done by those who wait for us, or by the lease
)


class Keeper:
    """sock: to the server. Its end of file, or `end`, ends the pool, unless that has a name."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lines = sock.makefile("rb")
        self._end = threading.Event()

    def end(self) -> None:
        """Take the pool down; `run` returns when that is done."""
        self._end.set()

    def run(self) -> None:
        """Returns when the pool is down, or left to others."""
        line = self._lines.readline()
        if not line:
            return
        threading.Thread(target=self._await_end_of_file, daemon=True).start()
        try:
            self._keep(PoolConfig.from_json(line.decode()))
        except BaristaError as error:
            cause = cause_of(error)
            self._say(messages.fatal(cause.message, cause.remedy))
        except (RayError, ConnectionError, OSError, RuntimeError, ValueError) as error:
            self._say(messages.fatal(f"Ray failed: {error}", "Its logs are in /tmp/ray/session_latest/logs."))

    def _keep(self, config: PoolConfig) -> None:
        namespace = f"barista-{config.pool or secrets.token_hex(4)}"
        token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(32)
        Trust(token, Path(config.tls_dir) if config.tls_dir else None)  # a bad folder is found out before Ray starts
        self._say(messages.progress(0.0, "starting Ray"))
        with _cluster(config, namespace):
            self._say(messages.progress(0.5, "starting the controller"))
            controller, is_new = _controller(config, token, namespace)
            with contextlib.ExitStack() as farewell:
                if is_new:
                    farewell.callback(_tear_down, controller)
                address, token, digest, path = _answer(controller.about.remote(), config)
                if digest != config.model.digest:
                    raise ConfigError(
                        f"The pool {config.pool} serves another model ({path}, digest {digest.hex()}) than "
                        f"{config.model.path} (digest {config.model.digest.hex()}).",
                        "Give another --pool, or that model.",
                    )
                deployment = None
                if config.engines:
                    trust = Trust(token, Path(config.tls_dir) if config.tls_dir else None)
                    deployment = Deployment(config, namespace, controller, trust, self._say_waiting)
                elif is_new:
                    self._say(messages.progress(0.8, f"placing {config.workers} workers"))
                    _answer(controller.start_workers.remote(), config)
                self._say(messages.ready(address, token, config.pool or ""))
                self._wait(controller, config, deployment)
                if config.pool is not None:
                    farewell.pop_all()

    def _wait(self, controller: Any, config: PoolConfig, deployment: Deployment | None) -> None:
        while not self._end.wait(ALIVE_SECONDS):
            if deployment is not None:
                deployment.tend()
            if config.pool is None:
                with contextlib.suppress(RayError):
                    ray.get(controller.keep_alive.remote(), timeout=ALIVE_SECONDS)

    def _say_waiting(self, text: str) -> None:
        self._say(messages.progress(0.9, text))

    def _await_end_of_file(self) -> None:
        with contextlib.suppress(OSError):
            while self._lines.read(4096):
                pass
        self._end.set()
        timer = threading.Timer(FAREWELL_SECONDS, os._exit, (1,))
        timer.daemon = True
        timer.start()

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self._sock.sendall(line.encode() + b"\n")


def _cluster(config: PoolConfig, namespace: str) -> contextlib.AbstractContextManager[None]:
    address = os.environ.get("RAY_ADDRESS")
    if address:
        return joined_cluster(address, namespace)
    if config.pool is not None:
        raise ConfigError(
            f"The pool {config.pool} shall outlive its server, so it needs a Ray cluster that does.",
            f"Start one with: ray start --head --resources='{json.dumps({'barista_worker': max(4, config.workers)})}', "
            "and set RAY_ADDRESS=127.0.0.1:6379.",
        )
    return local_cluster(namespace)


def _controller(config: PoolConfig, token: str, namespace: str) -> tuple[Any, bool]:
    """The pool's controller, and whether it is a new one, which then takes the token."""
    with contextlib.suppress(ValueError):
        return ray.get_actor(NAME, namespace), False
    here = ray.get_runtime_context().get_node_id()
    controller = (
        ray.remote(ControllerActor)
        .options(
            name=NAME,
            namespace=namespace,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=8,
            num_cpus=0,
            # Without encryption its engines, which are here, cannot reach it on another node.
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=config.tls_dir is not None),
            runtime_env=package_env(),
        )
        .remote(config, token, namespace, ray.util.get_node_ip_address())
    )
    return controller, True


def _answer(reference: Any, config: PoolConfig) -> Any:
    """What the controller answers. Raises ConfigError when it takes too long, as one that Ray cannot place does."""
    try:
        return ray.get(reference, timeout=CONTROLLER_SECONDS)
    except GetTimeoutError:
        pool = f"of pool {config.pool} " if config.pool else ""
        raise ConfigError(
            f"The controller {pool}has not answered within {CONTROLLER_SECONDS:.0f} s.",
            "See in `ray list actors` what it waits for and in `ray status` whether its node lives, "
            "or give another --pool.",
        ) from None


def _tear_down(controller: Any) -> None:
    with contextlib.suppress(RayError):
        ray.get(controller.tear_down.remote(), timeout=FAREWELL_SECONDS / 2)
    with contextlib.suppress(RayError):
        ray.kill(controller, no_restart=True)


def main() -> None:
    """Only our own lines go to standard error: Ray's are for its log files, and nothing is for standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fd, parent = map(int, sys.argv[1:])
    stream = os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1)
    logging.basicConfig(stream=stream, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (sys.stdout, sys.stderr):
        os.dup2(nowhere, output.fileno())
    os.set_inheritable(fd, False)  # no process that this one starts may keep the stream open
    try:
        with socket.socket(fileno=fd) as sock:
            keeper = Keeper(sock)
            signal.signal(signal.SIGTERM, lambda *_: keeper.end())
            end_with_parent(parent)
            keeper.run()
    except Exception:
        log.exception("The keeper of the pool failed.")
        raise


if __name__ == "__main__":
    main()
