"""The engines of a deployment as Ray sees them: processes under named actors, one on each node that offers a place.

What an engine is, this package does not know: a command that takes --host, drains at SIGTERM, and ends when its
standard input does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from experts.cluster.workers import package_env

log = logging.getLogger(__name__)

ENGINE_RESOURCE = "barista_engine"
PREFIX = "engine-"
ANSWER_SECONDS = 5.0
RESTART_SECONDS = 2.0  # between the end of a process and the next one
LOOPBACK_HOST = "127.0.0.1"


class EngineActor:
    """Runs `command`, and ends when that has ended, so that Ray makes another one. loopback: listen there alone."""

    def __init__(self, command: Sequence[str], *, loopback: bool) -> None:
        self._command = tuple(command)
        self._draining = False
        host = LOOPBACK_HOST if loopback else ray.util.get_node_ip_address()
        # Whatever ends this process closes the pipe, and the engine with it.
        self._process = subprocess.Popen([*command, "--host", host, "--until-eof"], stdin=subprocess.PIPE)
        threading.Thread(target=self._follow, daemon=True).start()

    def about(self) -> tuple[tuple[str, ...], str]:
        """The command, and the id of this node."""
        return self._command, ray.get_runtime_context().get_node_id()

    def drain(self) -> int:
        """Let it finish, or hand over, what it has open. Returns its exit status; no other one is started here."""
        self._draining = True
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait()

    def _follow(self) -> None:
        status = self._process.wait()
        if self._draining:
            return
        log.error("The engine has ended with exit status %d; another one is started.", status)
        time.sleep(RESTART_SECONDS)
        os._exit(1)


class RayEngines:
    """`replicas` actors engine-0, engine-1, ... of the namespace, each with `command`. Call `tend` now and then."""

    def __init__(self, namespace: str, replicas: int, command: Sequence[str], *, loopback: bool) -> None:
        self._namespace = namespace
        self._wanted = [f"{PREFIX}{number}" for number in range(replicas)]
        self._command = tuple(command)
        self._loopback = loopback
        self._known: set[str] = set()  # that run this command

    def tend(self) -> None:
        """Make what is missing; drain and replace one that runs another command; drain and end what is too much.

        One replacement a call, so that the others serve meanwhile. Returns when it is drained.
        """
        there = engine_names(self._namespace)
        for name in self._wanted:
            if name not in there:
                self._make(name)
        stale = [name for name in there if name not in self._wanted or not self._is_current(name)]
        if stale:
            end_engine(self._namespace, stale[0])
            if stale[0] in self._wanted:
                self._make(stale[0])

    def _make(self, name: str) -> None:
        self._known.add(name)
        ray.remote(EngineActor).options(
            name=name,
            namespace=self._namespace,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=4,
            num_cpus=0,
            resources={ENGINE_RESOURCE: 1},
            scheduling_strategy="SPREAD",
            runtime_env=package_env(),
        ).remote(self._command, loopback=self._loopback)

    def _is_current(self, name: str) -> bool:
        """One that does not answer is being placed or restarted, and is asked again at the next call."""
        if name in self._known:
            return True
        with contextlib.suppress(RayError, ValueError):
            if about(self._namespace, name)[0] != self._command:
                return False
            self._known.add(name)
        return True


def engine_names(namespace: str) -> list[str]:
    """The engines of this namespace, by number."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors if actor["namespace"] == namespace]
    return sorted((name for name in names if name.startswith(PREFIX)), key=lambda name: (len(name), name))


def engine_on(namespace: str, node_id: str) -> str | None:
    """The engine on this node, if there is one."""
    for name in engine_names(namespace):
        with contextlib.suppress(RayError, ValueError):
            if about(namespace, name)[1] == node_id:
                return name
    return None


def about(namespace: str, name: str) -> tuple[tuple[str, ...], str]:
    """An engine's command, and the id of its node. Raises RayError when it does not answer, ValueError: it has gone."""
    actor: Any = ray.get_actor(name, namespace)
    command, node_id = ray.get(actor.about.remote(), timeout=ANSWER_SECONDS)
    return tuple(command), node_id


def drain_engine(namespace: str, name: str) -> None:
    """Returns when it has nothing open any more. It stays, ended, until its node goes or someone ends it."""
    with contextlib.suppress(RayActorError, ValueError):
        actor: Any = ray.get_actor(name, namespace)
        ray.get(actor.drain.remote())


def end_engine(namespace: str, name: str) -> None:
    """Drain it and kill its actor."""
    drain_engine(namespace, name)
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(name, namespace), no_restart=True)
