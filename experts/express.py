"""The common case of a worker group in two calls: every worker asked has a free window, and all answer in time.

Between two layers an engine has microseconds, and each step in Python costs one. So the whole way out (choose owners,
split, copy, publish) is one call of src/group.cpp, and the whole way back (wait, find the rows, combine) is another.
Whatever is not the common case is left to experts/group.py: before anything was sent, or with the requests as they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from experts import kernels
from experts.kernels.addresses import address_of
from experts.kernels.dtypes import DTYPES
from experts.layer import Layer
from experts.liveness import EXPERT_COST, work_of
from experts.roster import Member, Routing
from experts.transport.shm import ShmLink
from experts.transport.window import Dispatch

_P, _L, _I, _U, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_uint32, ctypes.c_double
_DONE = 0  # enum bk_group_result of src/group.cpp


class _Member(ctypes.Structure):
    """struct bk_group_member of src/group.cpp."""

    _fields_ = (
        ("end", _P),
        ("deadline", _L),
        ("number", _U),
        ("reserved", _U),
        ("num_experts", _I),
        ("num_rows", _I),
        ("num_pairs", _I),
        ("seen", _I),
        ("answered", _L),
        ("epoch", ctypes.c_uint64),
        ("compute_nanoseconds", ctypes.c_uint64),
        ("waited", ctypes.c_uint64),
    )


@dataclass(slots=True)
class Share:
    """What one worker was sent. link: as of then. answered: CLOCK_MONOTONIC seconds, once it has;
    waited: it had not when it was looked at first, so that this is the time at which it did."""

    member: Member
    link: ShmLink
    work: int
    num_pairs: int
    answered: float = 0.0
    waited: bool = False
    compute_seconds: float = 0.0
    epoch: int = 0


@dataclass(slots=True)
class Sent:
    """A layer that went out by one call. owner: [num_experts] int32, of kernels.route. started: CLOCK_MONOTONIC."""

    routing: Routing
    owner: np.ndarray
    shares: list[Share]
    started: float


class Express:
    """clock: CLOCK_MONOTONIC in seconds. Used by one thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._members: list[_Member] = []
        self._array: ctypes.Array[_Member] | None = None
        self._at = 0
        self._dispatch = Dispatch(size=ctypes.sizeof(Dispatch))
        self._dispatch_at = ctypes.addressof(self._dispatch)
        self._send, self._receive = _functions()

    def dispatch(self, layer: Layer, routing: Routing) -> Sent | None:
        """Send every pair to an owner. None, with nothing sent, if that takes more than windows that are free."""
        links: list[object] = [member.link for member in routing.members]
        if self._send is None or not links:
            return None
        if len(links) != len(self._members):
            self._prepare(len(links))
        for entry, link in zip(self._members, links, strict=True):
            free = isinstance(link, ShmLink) and not link.outstanding
            entry.end, entry.number = (link.end, link.number) if free else (None, 0)  # type: ignore[attr-defined]
        batch, topk_ids = layer.batch, layer.topk_ids
        hidden_states, replicas = batch.hidden_states, routing.replicas
        assert hidden_states.stride(1) == 1
        num_tokens, top_k = topk_ids.shape
        num_experts, num_replicas = replicas.shape
        dispatch = self._dispatch
        dispatch.step, dispatch.layer, dispatch.epoch = batch.step, batch.layer, routing.epoch
        owner = np.empty(num_experts, dtype=np.int32)
        started = self._clock()
        status = self._send(
            self._at,
            len(links),
            hidden_states.data_ptr(),
            hidden_states.stride(0) * hidden_states.itemsize,
            address_of(topk_ids),
            num_tokens,
            top_k,
            address_of(replicas),
            num_experts,
            num_replicas,
            address_of(routing.cost),
            EXPERT_COST,
            self._dispatch_at,
            address_of(owner),
        )
        if status != _DONE:
            return None
        return Sent(routing, owner, self._shares(routing, links, started), started)

    def combine(self, layer: Layer, sent: Sent) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The layer's rows and failed, all False. None if anything is late, lost, refused or not finite: what has been
        sent is then still to be received, from each share's link."""
        assert self._receive is not None
        batch, topk_ids = layer.batch, layer.topk_ids
        num_tokens, hidden_size = batch.hidden_states.shape
        assert batch.topk_weights.is_contiguous()
        rows = torch.empty((num_tokens, hidden_size), dtype=batch.hidden_states.dtype)
        failed = torch.empty(num_tokens, dtype=torch.bool)
        status = self._receive(
            self._at,
            len(self._members),
            address_of(topk_ids),
            num_tokens,
            topk_ids.shape[1],
            address_of(sent.owner),
            address_of(layer.addresses),
            batch.topk_weights.data_ptr(),
            rows.data_ptr(),
            failed.data_ptr(),
            hidden_size,
            DTYPES[rows.dtype],
        )
        if status != _DONE:
            layer.addresses[:] = 0
            return None
        for share in sent.shares:
            share.link.received()
            entry = self._members[share.member.index]
            share.answered, share.waited, share.epoch = entry.answered * 1e-9, entry.waited != 0, entry.epoch
            share.compute_seconds = entry.compute_nanoseconds * 1e-9
        return rows, failed

    def _shares(self, routing: Routing, links: list[object], started: float) -> list[Share]:
        shares = []
        for member, link, entry in zip(routing.members, links, self._members, strict=True):
            num_pairs = entry.num_pairs
            if num_pairs:
                work = work_of(entry.num_experts, num_pairs)
                assert isinstance(link, ShmLink)  # and not member.link, which may have been replaced since
                link.sent(entry.number, entry.num_rows, num_pairs)
                entry.deadline = int((started + member.liveness.hedge_after(work)) * 1e9)
                shares.append(Share(member, link, work, num_pairs))
        return shares

    def _prepare(self, num_members: int) -> None:
        """Room for so many members. Windows are named in it for a layer only, whose shares keep them alive."""
        self._array = (_Member * num_members)()
        self._members = list(self._array)
        self._at = ctypes.addressof(self._array)


def _functions() -> tuple[Callable[..., int] | None, Callable[..., int] | None]:
    """Those of src/group.cpp; None where there are no compiled kernels."""
    library = kernels.compiled()
    if library is None:
        return None, None
    send, receive = library.bk_group_dispatch, library.bk_group_combine
    send.argtypes, send.restype = [_P, _L, _P, _L, _P, _L, _L, _P, _L, _L, _P, _D, _P, _P], _I
    receive.argtypes, receive.restype = [_P, _L, _P, _L, _L, _P, _P, _P, _P, _P, _L, _I], _I
    return send, receive
