"""How an engine and its workers come to be one group, and another one after that has broken.

The engine keeps a torch.distributed TCPStore, by which they find each other. Groups are numbered. A worker says that it
is there for the next one; the engine chooses among those that came, writes the Agreement, and waits until each has
loaded its share and said that it is ready, or why not. Only then is the group made. So whatever does not fit is found
before any tensor travels, and by name. A worker whose group has broken comes for the next one.

Neither the store nor gloo or NCCL knows who is speaking, or hides what is said: they belong on a network of their own.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from barista.addresses import is_host_port
from barista.errors import BaristaError, ConfigError
from experts.transport.dist import ExpertRows, serve
from experts.transport.dist_agreement import Agreement
from experts.transport.dist_group import FOREVER, Group, GroupBroken

logger = logging.getLogger(__name__)

# (what was agreed on, the experts of this rank by layer) -> how to compute them. Raises BaristaError for what it cannot
# serve; the engine raises that as well.
Load = Callable[[Agreement, Mapping[int, tuple[int, ...]]], ExpertRows]

_CPU = torch.device("cpu")
_CONNECT = timedelta(seconds=60)
_POLL = 0.01  # seconds
_COUNT = "groups"
_YES = "yes"
_END = "end"


class Rendezvous:
    """The engine's end. Listens on `address`; port 0 takes a free one. Raises ConfigError if it cannot be had."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        try:
            listener = socket.create_server((host, port))  # the store by itself would listen on every interface
        except OSError as error:
            raise ConfigError(f"Cannot listen on {host}:{port}: {error}.", "Choose another port or address.") from error
        port = listener.getsockname()[1]
        self.address = f"{host}:{port}"
        self._store = dist.TCPStore(
            host, port, is_master=True, timeout=_CONNECT, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self._number = 0

    def gather(self, count: int, within: float) -> tuple[str, ...]:
        """The names of the workers that have come for the next group, sorted: at least `count`, or fewer once `within`
        seconds have passed. One that has died since is among them, and `form` will say so."""
        deadline = time.monotonic() + within
        while len(names := self._arrived()) < count and time.monotonic() < deadline:
            time.sleep(_POLL)
        return names

    def form(self, agreement: Agreement, within: float, device: torch.device = _CPU) -> Group:
        """The group of these members, once each has loaded its experts. within: seconds for that.

        Raises ConfigError, which names the worker and its reason, if one does not become ready; GroupBroken if one is
        lost while the group is made. The others then wait for the next group.
        """
        key, store = _group(self._number), self._store
        self._number = store.add(_COUNT, 1)
        store.set(f"{key}/agreement", agreement.to_json())
        deadline = time.monotonic() + within
        for rank, name in enumerate(agreement.members, start=1):
            try:
                answer = _get(store, f"{key}/rank-{rank}", timedelta(seconds=max(deadline - time.monotonic(), _POLL)))
            except dist.DistStoreError:
                answer = f"it has said nothing for {within:g} s."
            if answer != _YES:
                store.set(f"{key}/go", f"not with {name}")
                raise ConfigError(f"Worker {name} cannot join the group: {answer}", "Start it anew, or leave it out.")
        store.set(f"{key}/go", _YES)
        return Group(PrefixStore(key, store), agreement, 0, device)

    def close(self) -> None:
        """Let the workers that wait for a group end."""
        self._store.set(f"{_group(self._number)}/agreement", _END)

    def _arrived(self) -> tuple[str, ...]:
        key = _group(self._number)
        arrivals = self._store.add(f"{key}/arrivals", 0)
        return tuple(sorted({self._store.get(f"{key}/arrival-{n}").decode() for n in range(1, arrivals + 1)}))


def run_worker(address: str, name: str, load: Load, device: torch.device = _CPU) -> None:
    """A worker: serve in group after group until the engine says stop. address: of the engine's Rendezvous.

    name: this worker's own, as no other's. Raises GroupBroken once the engine has gone, or if it is not there, and
    ConfigError for what is no address.
    """
    if not is_host_port(address):
        raise ConfigError(f"{address!r} is no HOST:PORT.", "Give that of the engine's rendezvous.")
    host, _, port = address.rpartition(":")
    try:
        store = dist.TCPStore(host, int(port), is_master=False, timeout=_CONNECT, wait_for_workers=False)
        while (group := _come(store, name)) is not None:
            key, agreement = group
            if name in agreement.members and _serve_in(store, key, agreement, name, load, device):
                return
    except dist.DistNetworkError as error:
        raise GroupBroken(f"the engine at {address} cannot be reached") from error


def _come(store: Store, name: str) -> tuple[str, Agreement] | None:
    """Wait for the next group, whoever will be in it: its key, and what was agreed on. None at the end."""
    key = _group(store.add(_COUNT, 0))
    store.set(f"{key}/arrival-{store.add(f'{key}/arrivals', 1)}", name)
    text = _get(store, f"{key}/agreement")
    return None if text == _END else (key, Agreement.from_json(text))


def _serve_in(store: Store, key: str, agreement: Agreement, name: str, load: Load, device: torch.device) -> bool:
    """Serve in a group, if it comes to be. Returns whether the engine said stop, False if the group has broken."""
    rank = 1 + agreement.members.index(name)
    try:
        rows = load(agreement, agreement.share(rank))
    except BaristaError as error:
        store.set(f"{key}/rank-{rank}", str(error))
        return False
    store.set(f"{key}/rank-{rank}", _YES)
    if _get(store, f"{key}/go") != _YES:
        return False
    try:
        group = Group(PrefixStore(key, store), agreement, rank, device)
        try:
            serve(group, agreement, rows)
        finally:
            group.leave()
    except GroupBroken as error:
        logger.warning("%s: the group has ended: %s", name, error)
        return False
    return True


def _group(number: int) -> str:
    return f"group-{number}"


def _get(store: Store, key: str, timeout: timedelta = FOREVER) -> str:
    """The value of a key, once it has one. Raises dist.DistStoreError after the timeout."""
    store.wait([key], timeout)
    value: bytes = store.get(key)
    return value.decode()
