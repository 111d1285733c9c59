"""`barista serve`: from a configuration to a server that answers, and from a signal to nothing left behind.

The order: take the port, find (or carve) the model, start the engine's process and beside it the API, which says "not
ready" while the engine loads, then wait for whatever ends it. This process imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
from pathlib import Path

import typer

from barista.config import ServeConfig
from barista.errors import BaristaError, ConfigError
from router.announce import base_url
from router.engine_process import EngineChild
from router.keys import read_keys
from router.log import log_to_stderr
from router.messages import ModelInfo
from router.models import BUILT_IN, resolve


def serve(config: ServeConfig, *, as_json: bool = False, until_eof: bool = False) -> int:
    """Serve until a signal (or, with until_eof, the end of standard input) and return the exit status.

    as_json: print one JSON object when ready instead of the lines for people. Raises BaristaError: the port is in use,
    keys are missing, the model cannot be loaded, or the engine died.
    """
    log_to_stderr(config.log_level)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its other lines tell what ours tell
    keys = read_keys(config)
    _check(config)
    with listen(config.host, config.port) as sock, contextlib.ExitStack() as stack:
        path = prepared(config.model)
        url = base_url(config.host, sock.getsockname()[1])
        # What is imported here takes a second that an error in what was checked above need not wait for.
        if config.engines is not None:
            from router.assemble import assemble_api

            server, announcement = assemble_api(config, path, keys, url)
        else:
            child = stack.enter_context(contextlib.closing(EngineChild()))  # imports torch while we import the API
            from router.assemble import assemble

            server, announcement = assemble(config, path, keys, url, child)
        text = announcement.as_json if as_json else announcement.as_text

        def announce(model: ModelInfo) -> None:
            typer.echo(text(model, server.grpc_address))

        return asyncio.run(server.run(sock, announce, until_eof=until_eof))


def _check(config: ServeConfig) -> None:
    if config.controller is not None:
        raise ConfigError(
            f"controller is {config.controller}, which is for `barista engine`.",
            "Give --pool NAME to join a pool that has a name, or leave controller out.",
        )
    if (config.engines or "").startswith("ray:") and config.tls_dir is None:
        raise ConfigError(
            f"engines is {config.engines}, but without certificates engines listen on 127.0.0.1 alone.",
            "Give --tls-dir, or on one machine --engines 127.0.0.1:50051.",
        )
    if config.tls_dir is not None and not config.has_pool and config.engines is None:
        raise ConfigError(
            f"tls_dir is {config.tls_dir}, but there is no pool of workers to reach over a network.",
            "Leave tls_dir out, or on CPUs give --workers N or --pool NAME with it.",
        )


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address, so that nobody else takes it while the model loads. Raises ConfigError."""
    sock = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen()
    except UnicodeError as error:
        raise ConfigError(f"Cannot listen on {host!r}: no host has such a name.", "Correct --host.") from error
    except OSError as error:
        if sock is not None:
            sock.close()
        remedy = "Stop what listens there, or choose another with --port." if sock else "Correct --host."
        raise ConfigError(f"Cannot listen on {host}, port {port}: {error.strerror}.", remedy) from error
    return sock


def prepared(model: str) -> Path:
    """The model's path. A missing house-blend is carved first, in a process of its own, because that needs torch."""
    path = resolve(model)
    if model == BUILT_IN and not path.exists():
        status = subprocess.run(
            [sys.executable, "-m", "router.cli", "models", "--prepare", BUILT_IN], stdin=subprocess.DEVNULL, check=False
        ).returncode
        if status != 0:
            raise BaristaError(f"{BUILT_IN} could not be made (exit status {status}).", "The lines above say why.")
    return path
