"""The engines of a deployment as Ray sees them: processes under named actors, one on each node that offers a place.

What an engine is, this package does not know: a command that takes --host, says when it serves, drains at SIGTERM, and
ends when its standard input does.
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
from ray.exceptions import GetTimeoutError, RayError

from experts.cluster.workers import package_env

log = logging.getLogger(__name__)

ENGINE_RESOURCE = "barista_engine"
PREFIX = "engine-"
ANSWER_SECONDS = 5.0
DRAIN_SECONDS = 600.0  # it has a limit of its own for that, which is shorter
RESTART_SECONDS = 2.0  # between the end of a process and the next one
LOOPBACK_HOST = "127.0.0.1"

About = tuple[tuple[str, ...], str, bool]


class EngineActor:
    """Runs `command`, and ends when that has ended, so that Ray makes another one. loopback: listen there alone.

    The command says that it serves by a line that begins with "Ready".
    """

    def __init__(self, command: Sequence[str], *, loopback: bool) -> None:
        self._command = tuple(command)
        self._draining = False
        self._ready = False
        host = LOOPBACK_HOST if loopback else ray.util.get_node_ip_address()
        # Whatever ends this process closes the pipe, and the engine with it.
        self._process = subprocess.Popen(
            [*command, "--host", host, "--until-eof"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        threading.Thread(target=self._follow, daemon=True).start()

    def about(self) -> About:
        """The command, the id of this node, and whether it serves."""
        return self._command, ray.get_runtime_context().get_node_id(), self._ready

    def drain(self) -> int:
        """Let it finish, or hand over, what it has open. Returns its exit status; no other one is started here."""
        self._draining = True
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._ready |= line.startswith("Ready")
            print(line, end="", flush=True)  # noqa: T201  # to this actor's log
        status = self._process.wait()
        if self._draining:
            return
        log.error("The engine has ended with exit status %d; another one is started.", status)
        time.sleep(RESTART_SECONDS)
        os._exit(1)


class RayEngines:
    """`replicas` actors engine-0, engine-1, ... of the namespace, each with `command`. Call `tend` now and then."""

    def __init__(self, namespace: str, replicas: int, command: Sequence[str], *, loopback: bool) -> None:
        self.command = tuple(command)
        self._namespace = namespace
        self._wanted = [f"{PREFIX}{number}" for number in range(replicas)]
        self._loopback = loopback

    def tend(self) -> list[str]:
        """Make what is missing; drain and replace one that runs another command; drain and end what is too much.

        One replacement a call, and only while all others serve. Returns, for people, what keeps an engine from serving.
        """
        there = engine_names(self._namespace)
        troubles = []
        stale = [name for name in there if name not in self._wanted]
        for name in self._wanted:
            if name not in there:
                self._make(name)
            try:
                command, _, is_ready = about(self._namespace, name)
            except GetTimeoutError:
                troubles.append(f"{name} waits for a node that offers {ENGINE_RESOURCE}")
            except (RayError, ValueError) as error:
                troubles.append(f"{name} cannot run: {str(error).strip().splitlines()[-1]}")
            else:
                if command != self.command:
                    stale.append(name)
                elif not is_ready:
                    troubles.append(f"{name} loads")
        if stale and (not troubles or stale[0] not in self._wanted):
            end_engine(self._namespace, stale[0])
            if stale[0] in self._wanted:
                self._make(stale[0])
        return troubles

    def _make(self, name: str) -> None:
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
        ).remote(self.command, loopback=self._loopback)


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


def about(namespace: str, name: str) -> About:
    """As EngineActor.about. Raises RayError when it does not answer (GetTimeoutError: in time), ValueError: gone."""
    actor: Any = ray.get_actor(name, namespace)
    command, node_id, is_ready = ray.get(actor.about.remote(), timeout=ANSWER_SECONDS)
    return tuple(command), node_id, is_ready


def drain_engine(namespace: str, name: str) -> None:
    """Returns when it has nothing open any more. It stays, ended, until its node goes or someone ends it.

    One that does not answer runs nowhere, or hangs: there is nothing to drain.
    """
    with contextlib.suppress(RayError, ValueError):
        about(namespace, name)
        actor: Any = ray.get_actor(name, namespace)
        ray.get(actor.drain.remote(), timeout=DRAIN_SECONDS)


def end_engine(namespace: str, name: str) -> None:
    """Drain it and kill its actor."""
    drain_engine(namespace, name)
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(name, namespace), no_restart=True)
