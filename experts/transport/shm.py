"""Rows through shared memory: the engine's and the worker's end of a window (window.py, cuda/window.h).

A window says nothing about the life of the other end. The control stream beside it does: when that breaks, the end that
is left closes its window, and every wait on it ends.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
from torch import Tensor

from experts.kernels import LayerTables
from experts.kernels.addresses import address_of
from experts.link import LinkCounters, LinkDown, RowsReply, RowsRequest, RowsStatus
from experts.transport.window import CLOSED, LATE, MAX_NOT_HELD, READY, Combine, Dispatch, Window

logger = logging.getLogger(__name__)

# Rows.Status of proto/barista/v1/experts.proto
_STATUS_CODES = {RowsStatus.OK: 1, RowsStatus.NOT_HELD: 2, RowsStatus.FAILED: 3}
_STATUSES = {code: status for status, code in _STATUS_CODES.items()}

_NUMBERS = 1 << 32  # a request's number is taken modulo this
_TURN_SECONDS = 1.0  # the longest single wait of a worker
_FAR = 4e9  # seconds: later than any deadline


class ShmLink:
    """experts.link.Link over a window. One request at a time: a window's regions are written once the last is answered.

    on_control_down: takes the function to call, from any thread, when the control stream to the worker ends, such as
    grpc.Call.add_callback.
    """

    transport = "shm"
    depth = 1

    def __init__(self, window: Window, on_control_down: Callable[[Callable[[], None]], object] | None = None) -> None:
        self.max_rows = window.max_rows
        self.counters = LinkCounters()
        self._window = window
        self._top_k = window.top_k
        self._hidden_size = window.hidden_size
        self._dtype = window.dtype
        self._itemsize = window.dtype.itemsize
        self._row_bytes = window.hidden_size * window.dtype.itemsize
        self._end = window.end
        self._out = window.out.data_ptr()
        self._number = 0
        self._pairs_of_outstanding: int | None = None
        self._dispatch = Dispatch(size=ctypes.sizeof(Dispatch))
        self._dispatch_at = ctypes.addressof(self._dispatch)
        self._combine = Combine()
        self._combine_at = ctypes.addressof(self._combine)
        self._send = window.functions.bk_window_send
        self._receive = window.functions.bk_window_receive
        if on_control_down is not None:
            on_control_down(self.abort)

    @property
    def down(self) -> bool:
        """True once either end has closed the window. Never waits."""
        return self._window.closed

    @property
    def outstanding(self) -> int:
        """1 while a request is not answered, else 0."""
        return int(self._pairs_of_outstanding is not None)

    @property
    def end(self) -> int:
        """This end of the window, for src/group.cpp, which sends and receives for several links at once."""
        return self._end

    @property
    def number(self) -> int:
        """Of the last request."""
        return self._number

    def sent(self, number: int, num_rows: int, num_pairs: int) -> None:
        """A request was written into the window without `send`."""
        self._number, self._pairs_of_outstanding = number, num_pairs
        counters = self.counters
        counters.requests += 1
        counters.bytes_sent += num_rows * (self._row_bytes + 4 * self._top_k)

    def received(self) -> None:
        """Its rows were taken from the window without `receive`."""
        self.counters.bytes_received += (self._pairs_of_outstanding or 0) * self._row_bytes
        self._pairs_of_outstanding = None

    def send(self, request: RowsRequest) -> None:
        """Copy the chosen rows into the window. Raises LinkDown; RuntimeError while a request is not answered."""
        if self._pairs_of_outstanding is not None:
            raise RuntimeError("the window still holds a request without an answer")
        hidden_states, tokens, topk_ids = request.hidden_states, request.tokens, request.topk_ids
        num_tokens, hidden_size = hidden_states.shape
        row_stride, value_stride = hidden_states.stride()
        num_rows = len(tokens)
        assert hidden_states.dtype is self._dtype
        assert hidden_size == self._hidden_size
        assert value_stride == 1
        assert tokens.dtype == topk_ids.dtype == np.int32
        assert topk_ids.shape == (num_rows, self._top_k)
        number = (self._number + 1) % _NUMBERS
        dispatch = self._dispatch
        dispatch.num_rows, dispatch.num_pairs = num_rows, request.num_pairs
        dispatch.step, dispatch.layer, dispatch.attempt = request.step, request.layer, request.attempt
        dispatch.epoch = request.epoch
        sent = self._send(
            self._end,
            number,
            self._dispatch_at,
            hidden_states.data_ptr(),
            num_tokens,
            row_stride * self._itemsize,
            address_of(tokens),
            address_of(topk_ids),
        )
        if sent == CLOSED:
            raise LinkDown("the window is closed")
        if sent != READY:
            raise ValueError(f"{num_rows} rows do not fit a window of {self.max_rows}, or a token is out of range")
        self.sent(number, num_rows, request.num_pairs)

    def receive(self, deadline: float) -> RowsReply | None:
        """The answer to the request sent last; None if `time.monotonic()` passes `deadline` first. Raises LinkDown."""
        num_pairs = self._pairs_of_outstanding
        if num_pairs is None:
            raise RuntimeError("nothing was sent that could be answered")
        seen = self._receive(self._end, self._number, _nanoseconds(deadline), self._combine_at)
        if seen == LATE:
            return None
        combine = self._combine
        status = _STATUSES.get(combine.status)
        if seen == CLOSED:
            raise LinkDown("the window is closed")
        if seen != READY or status is None:
            self.abort()
            raise LinkDown("the worker wrote an answer that makes no sense into the window")
        self._pairs_of_outstanding = None
        ok = status is RowsStatus.OK
        if ok:
            self.counters.bytes_received += num_pairs * self._row_bytes
        return RowsReply(
            step=combine.step,
            layer=combine.layer,
            attempt=combine.attempt,
            status=status,
            epoch=combine.epoch,
            address=self._out if ok else 0,
            owner=self._window,
            not_held=() if ok else tuple(combine.not_held[: combine.num_not_held]),
            compute_seconds=combine.compute_nanoseconds * 1e-9,
        )

    def abort(self) -> None:
        """End every wait of both ends at once; the link is down. From any thread; idempotent."""
        self._window.close()

    def close(self) -> None:
        """End the wire. From any thread; idempotent. The memory stays as long as an answer refers to it."""
        self._window.close()
        self._window.unlink()


class Computed(Protocol):
    """How a computation ended. epoch: the newest placement that the worker knows. not_held: expert ids (NOT_HELD)."""

    @property
    def status(self) -> RowsStatus: ...
    @property
    def epoch(self) -> int: ...
    @property
    def not_held(self) -> tuple[int, ...]: ...


# Told of each computation, once it has been answered where that can be: (step, layer, attempt, num_pairs, nanoseconds).
Observe = Callable[[int, int, int, int, int], None]

# (layer, hidden_states [n, hidden], topk_ids [n, k] int32, out [num_pairs, hidden]) -> Computed. `out` is to be filled,
# in order of (row, place in the top-k), unless the status is another than OK. All three lie in the window.
Compute = Callable[[int, Tensor, Tensor, Tensor], Computed]


def serve_window(
    window: Window, compute: Compute, observe: Observe | None = None, tables: LayerTables | None = None
) -> None:
    """The worker's end: answer request after request, in this thread, until the window is closed.

    tables: what compiled code answers by itself, as long as nobody observes; `compute` is then asked for the rest.
    A computation that raises is logged and answered with FAILED. What contradicts the window's shape closes it.
    """
    dispatch, combine = Dispatch(), Combine(size=ctypes.sizeof(Combine))
    dispatch_at, combine_at = ctypes.addressof(dispatch), ctypes.addressof(combine)
    take, serve, answer = (getattr(window.functions, f"bk_window_{verb}") for verb in ("take", "serve", "answer"))
    number = 1
    next_number = ctypes.c_uint32()

    def next_request(until: int) -> int:
        nonlocal number
        if tables is None or observe is not None:
            return int(take(window.end, number, until, dispatch_at))
        next_number.value = number
        seen: int = serve(window.end, ctypes.addressof(next_number), until, tables.address, dispatch_at)
        number = next_number.value
        return seen

    while (seen := next_request(_nanoseconds(time.monotonic() + _TURN_SECONDS))) != CLOSED:
        if seen == LATE:
            continue
        if seen != READY:
            logger.error("an engine wrote a request that makes no sense into its window, which is closed")
            window.close()
            return
        combine.step, combine.layer, combine.attempt = dispatch.step, dispatch.layer, dispatch.attempt
        _compute(window, dispatch, combine, compute)
        answer(window.end, number, combine_at)
        if observe is not None:
            observe(dispatch.step, dispatch.layer, dispatch.attempt, dispatch.num_pairs, combine.compute_nanoseconds)
        number = (number + 1) % _NUMBERS


def _compute(window: Window, dispatch: Dispatch, combine: Combine, compute: Compute) -> None:
    num_rows = dispatch.num_rows
    start = time.perf_counter_ns()
    try:
        computed = compute(
            dispatch.layer,
            window.hidden_states[:num_rows],
            window.topk_ids[:num_rows],
            window.out[: dispatch.num_pairs],
        )
    except Exception:
        logger.exception("the experts of layer %d could not be computed", dispatch.layer)
        combine.status, combine.num_not_held = _STATUS_CODES[RowsStatus.FAILED], 0
    else:
        not_held = computed.not_held[:MAX_NOT_HELD]
        combine.status, combine.epoch = _STATUS_CODES[computed.status], computed.epoch
        combine.num_not_held = len(not_held)
        combine.not_held[: len(not_held)] = not_held
    combine.compute_nanoseconds = time.perf_counter_ns() - start


def _nanoseconds(deadline: float) -> int:
    return int(min(deadline, _FAR) * 1e9)
