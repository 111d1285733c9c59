"""One process's place in a torch.distributed group: the only file that calls its operations.

A group cannot lose a member: whoever dies, hangs or leaves ends it for all, within its timeout. NCCL carries what lies
on GPUs, gloo what lies in memory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from barista.errors import ConfigError
from experts.transport.dist_agreement import Agreement

FOREVER = timedelta(days=3650)


class GroupBroken(Exception):
    """The group is of no more use to anybody in it. The message says why, as far as this end can tell."""


class Group:
    """Rank `rank` of those that agreed. It is torch's default group, so a process has one at a time.

    store: of this group alone, by which the ranks find each other. device: where rows lie. Made once all are there.
    Raises GroupBroken if they do not come, ConfigError if this process is in a group already.
    """

    def __init__(self, store: Store, agreement: Agreement, rank: int, device: torch.device) -> None:
        if dist.is_initialized():
            raise ConfigError("This process is in a torch.distributed group already.", "Leave that first.")
        self.rank, self.size, self.device = rank, agreement.world_size, device
        self._agreement = agreement
        self._under_way: WeakSet[Works] = WeakSet()
        backend = "gloo"
        if device.type != "cpu":
            backend = f"cpu:gloo,{device.type}:nccl"
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # or a late operation ends the process
        timeout = timedelta(seconds=agreement.timeout)
        try:
            with _broken("the group could not be formed"):
                dist.init_process_group(backend, store=store, rank=rank, world_size=self.size, timeout=timeout)
                dist.all_reduce(torch.zeros(1, device=device))  # NCCL wants everybody in a group's first operation
        except GroupBroken:
            _count_anew()
            raise
        self._joined = True

    def send(self, messages: Mapping[int, Tensor]) -> Works:
        """Start sending each rank its contiguous tensor, which may not change until it has gone."""
        return self._exchange(dist.isend, messages)

    def receive(self, room: Mapping[int, Tensor]) -> Works:
        """Start filling contiguous tensors with what each rank sends next, which must have their sizes."""
        return self._exchange(dist.irecv, room)

    def broadcast(self, tensor: Tensor) -> Works:
        """Start copying rank 0's tensor into everybody's."""
        with _broken("a broadcast failed"):
            return self._started([("a broadcast failed", dist.broadcast(tensor, 0, async_op=True))])

    def reduce(self, tensor: Tensor) -> Works:
        """Start adding everybody's tensor to rank 0's. What is left in the others' is of no use."""
        with _broken("a reduction failed"):
            return self._started([("a reduction failed", dist.reduce(tensor, 0, async_op=True))])

    def leave(self) -> None:
        """End the group, for the others as well. Idempotent."""
        if self._joined:
            self._joined = False
            dist.destroy_process_group()
            for works in self._under_way:
                works.forget()

    def _exchange(self, operation: Callable[..., Any], tensors: Mapping[int, Tensor]) -> Works:
        if not tensors:
            return self._started([])
        names = [f"{self._agreement.name(peer)} is lost" for peer in tensors]
        with _broken(" or ".join(names)):
            works = dist.batch_isend_irecv([dist.P2POp(operation, tensor, peer) for peer, tensor in tensors.items()])
        if len(works) != len(names):  # NCCL makes one of all
            names = [" or ".join(names)] * len(works)
        return self._started(list(zip(names, works, strict=True)))

    def _started(self, works: list[tuple[str, dist.Work | None]]) -> Works:
        started = Works(works)
        self._under_way.add(started)
        return started


def _count_anew() -> None:
    """torch names a group by a count, which all of its ranks must share and only the end of a group sets back to 0."""
    if not dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if dist.is_initialized():
        dist.destroy_process_group()


class Works:
    """Operations under way, each with what has happened if it fails."""

    def __init__(self, works: list[tuple[str, dist.Work | None]]) -> None:
        self._works: list[tuple[str, dist.Work | None]] | None = works

    def wait(self, timeout: timedelta | None = None) -> None:
        """Until all are done. timeout: instead of the group's. Raises GroupBroken."""
        if self._works is None:
            raise GroupBroken("the group has ended")
        for failure, work in self._works:
            if work is not None:
                with _broken(failure):
                    work.wait() if timeout is None else work.wait(timeout)

    def forget(self) -> None:
        """The group has ended. While an operation of gloo's is in memory, its sockets stay open."""
        self._works = None


@contextlib.contextmanager
def _broken(failure: str) -> Iterator[None]:
    """torch tells all that can happen to a group as a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise GroupBroken(f"{failure}: {str(error).splitlines()[0]}") from error
