"""Rows over a gRPC stream: works between any two hosts. Both ends of the wire.

Messages are ExchangeRequest and ExchangeReply of proto/barista/v1/experts.proto. Rows are the last field on the wire,
so that a sender puts them behind a serialised header and a receiver uses them where they arrived: protobuf itself would
copy them twice. Any other valid encoding is understood too.
"""

from __future__ import annotations

import ctypes
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
import numpy as np
import torch
from google.protobuf.message import DecodeError

from barista.trust import MAX_MESSAGE_BYTES, Trust
from barista.v1.experts_pb2 import Dispatch, ExchangeReply, ExchangeRequest, Rows
from experts.link import LinkCounters, LinkDown, RowsReply, RowsRequest, RowsStatus
from experts.transport.shm import Compute, Computed, Observe

log = logging.getLogger(__name__)

DEPTH = 8
ROWS_MESSAGE_BYTES = 1 << 20  # of rows in one message, either way
_HEADER_BYTES = 64 << 10  # more than any header has

_ROWS_TAG = b"\x3a"  # field 7 of Dispatch and of Rows, length-delimited
_OUTER_TAG = b"\x12"  # field 2 of ExchangeRequest and of ExchangeReply, length-delimited

_STATUS = {
    RowsStatus.OK: Rows.STATUS_OK,
    RowsStatus.NOT_HELD: Rows.STATUS_NOT_HELD,
    RowsStatus.FAILED: Rows.STATUS_FAILED,
}
_STATUS_OF = {number: status for status, number in _STATUS.items()}

Header = TypeVar("Header", Dispatch, Rows)


class MalformedMessage(Exception):
    """A peer sent what the protocol does not allow."""


def join(header: Dispatch | Rows, rows: list[memoryview]) -> bytes:
    """The ExchangeRequest or ExchangeReply that holds `header` with these rows; copies each byte of them once."""
    head = header.SerializeToString()
    size = sum(map(len, rows))
    tail = _ROWS_TAG + _varint(size) if size else b""
    return b"".join([_OUTER_TAG, _varint(len(head) + len(tail) + size), head, tail, *rows])


def split(message: bytes, kind: type[Header]) -> tuple[Header, memoryview]:
    """What `join` put together: the header, its `rows` empty, and the rows where they lie in the message.

    Raises MalformedMessage.
    """
    try:
        start, end = _rows_at_the_end(message)
        return kind.FromString(message[_body(message) : start]), memoryview(message)[end:]
    except (IndexError, ValueError, DecodeError):  # another encoding, or none at all
        header = _parse(message, kind)
        rows = header.rows
        header.ClearField("rows")
        return header, memoryview(rows)


def _parse(message: bytes, kind: type[Header]) -> Header:
    outer: Any = ExchangeRequest() if kind is Dispatch else ExchangeReply()
    field = "dispatch" if kind is Dispatch else "rows"
    try:
        outer.ParseFromString(message)
    except DecodeError as error:
        raise MalformedMessage("not a message of this protocol") from error
    if outer.WhichOneof("message") != field:
        raise MalformedMessage(f"not a {field} message")
    header: Header = getattr(outer, field)
    return header


def _rows_at_the_end(message: bytes) -> tuple[int, int]:
    """Where the field of rows begins, and where its bytes begin, when `message` ends with it. Raises ValueError."""
    place = _body(message)
    while place < len(message):
        tag, value = _read_varint(message, place)
        size, after = _read_varint(message, value)
        if tag & 7 == 0:
            place = after
        elif tag & 7 == 2:
            if tag == _ROWS_TAG[0] and after + size == len(message):
                return place, after
            place = after + size
        else:
            break
    raise ValueError("the rows are not at the end")


def _body(message: bytes) -> int:
    """Where the inner message begins. Raises ValueError if it is not all of the message."""
    size, place = _read_varint(message, 1)
    if message[:1] != _OUTER_TAG or place + size != len(message):
        raise ValueError("more than one field")
    return place


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
        if shift > 63:
            raise ValueError("not a varint")


def _address(buffer: memoryview) -> int:
    return int(np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]) if len(buffer) else 0


def _bytes_at(address: int, size: int) -> Any:
    """Memory as a buffer; whoever owns it must outlive the use."""
    return (ctypes.c_char * size).from_address(address)


class RowsServer:
    """The worker's end: answers the dispatches of one stream, one after the other.

    hidden_size, top_k, dtype: of the rows, as agreed at attach. observe: told of each computation.
    """

    def __init__(
        self, hidden_size: int, top_k: int, dtype: torch.dtype, compute: Compute, observe: Observe | None = None
    ) -> None:
        self._hidden_size = hidden_size
        self._top_k = top_k
        self._dtype = dtype
        self._row_bytes = hidden_size * dtype.itemsize
        self._compute = compute
        self._observe = observe
        self._out = np.empty(0, np.uint8)

    def answer(self, message: bytes) -> bytes:
        """A serialised ExchangeRequest in, a serialised ExchangeReply out. Raises MalformedMessage."""
        dispatch, rows = split(message, Dispatch)
        num_rows = dispatch.num_rows
        if len(rows) != num_rows * self._row_bytes or len(dispatch.topk_ids) != 4 * num_rows * self._top_k:
            raise MalformedMessage(
                f"{len(rows)} bytes of rows and {len(dispatch.topk_ids)} of ids are not {num_rows} rows of "
                f"{self._hidden_size} {self._dtype} with {self._top_k} experts each"
            )
        if num_rows == 0:
            raise MalformedMessage("a dispatch without rows")
        ids = np.frombuffer(bytearray(dispatch.topk_ids), np.int32).reshape(num_rows, self._top_k)
        num_pairs = int(np.count_nonzero(ids != -1))
        size = num_pairs * self._row_bytes
        if size > MAX_MESSAGE_BYTES - _HEADER_BYTES:
            raise MalformedMessage(f"the answer of {size} bytes would be too long")
        if size > self._out.nbytes:
            self._out = np.empty(size, np.uint8)
        started = time.perf_counter_ns()
        computed = self._run(dispatch.layer, rows, torch.from_numpy(ids), size)
        header = Rows(
            step=dispatch.step,
            layer=dispatch.layer,
            attempt=dispatch.attempt,
            status=_STATUS[computed.status],
            epoch=computed.epoch,
            not_held=computed.not_held,
            compute_nanoseconds=time.perf_counter_ns() - started,
        )
        if self._observe is not None:
            self._observe(header.step, header.layer, header.attempt, num_pairs, header.compute_nanoseconds)
        return join(header, [self._out[:size].data] if computed.status is RowsStatus.OK else [])

    def _run(self, layer: int, rows: memoryview, topk_ids: torch.Tensor, size: int) -> Computed:
        # Through the address, because torch warns of buffers that cannot be written; nobody writes to this one.
        buffer = _bytes_at(_address(rows), len(rows))
        hidden_states = torch.frombuffer(buffer, dtype=self._dtype).view(-1, self._hidden_size)
        out = torch.from_numpy(self._out[:size]).view(self._dtype).view(-1, self._hidden_size)
        try:
            return self._compute(layer, hidden_states, topk_ids, out)
        except ValueError as error:
            raise MalformedMessage(str(error)) from error


class ExchangeStream:
    """The engine's end of the stream itself: whole messages, and the news that it has ended.

    `close` may come from any thread; all else from one.
    """

    def __init__(self, address: str, trust: Trust) -> None:
        self.address = address
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._on_end: Callable[[], None] | None = None
        self._channel = trust.channel(address)
        exchange = self._channel.stream_stream("/barista.v1.Experts/Exchange")
        self._call = exchange(iter(self._requests.get, None), metadata=trust.metadata)
        self._reader = threading.Thread(target=self._read, name=f"exchange {address}", daemon=True)
        self._reader.start()

    @property
    def down(self) -> bool:
        """True once the stream has ended."""
        return self._reason is not None

    def write(self, message: bytes) -> None:
        """Send a serialised ExchangeRequest. Raises LinkDown."""
        if self._reason is not None:
            raise LinkDown(self._reason)
        self._requests.put(message)

    def read(self, deadline: float) -> bytes | None:
        """The next serialised ExchangeReply; None if `time.monotonic()` passes `deadline` first. Raises LinkDown."""
        try:
            message = self._replies.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None
        if message is None:
            self._replies.put(None)
            raise LinkDown(self._reason or "")
        return message

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Have `callback` called once the stream has ended, from another thread, or now if it has."""
        with self._lock:
            if self._reason is None:
                self._on_end = callback
                return
        callback()

    def close(self) -> None:
        """End the stream and every wait on it."""
        self._call.cancel()
        if threading.current_thread() is not self._reader:
            self._reader.join()

    def _read(self) -> None:
        reason = "the worker ended the stream"
        try:
            for message in self._call:
                self._replies.put(message)
        except grpc.RpcError as error:
            reason = f"{error.code().name}: {error.details()}"
            error.with_traceback(None)  # the error is the call: with its traceback it would keep this stream alive
        with self._lock:
            self._reason = f"{self.address}: {reason}"
            callback, self._on_end = self._on_end, None
        self._replies.put(None)
        self._requests.put(None)
        self._channel.close()
        if callback is not None:
            callback()


class GrpcLink:
    """The engine's end of rows in an attached stream: an experts.link.Link."""

    transport = "grpc"
    depth = DEPTH

    def __init__(self, stream: ExchangeStream, hidden_size: int, top_k: int, dtype: torch.dtype, max_rows: int) -> None:
        self.counters = LinkCounters()
        self._stream = stream
        self._row_bytes = hidden_size * dtype.itemsize
        self.max_rows = max(1, min(max_rows, ROWS_MESSAGE_BYTES // (top_k * self._row_bytes)))
        self._asked: deque[tuple[tuple[int, int, int], int]] = deque()  # tag and pairs of what is not answered

    @property
    def down(self) -> bool:
        """As Link."""
        return self._stream.down

    @property
    def outstanding(self) -> int:
        """As Link."""
        return len(self._asked)

    def send(self, request: RowsRequest) -> None:
        """As Link. Raises RuntimeError beyond `depth` unanswered requests."""
        if len(self._asked) >= self.depth:
            raise RuntimeError(f"{self.depth} requests are unanswered")
        header = Dispatch(
            step=request.step,
            layer=request.layer,
            attempt=request.attempt,
            epoch=request.epoch,
            num_rows=len(request.tokens),
            topk_ids=request.topk_ids.astype(np.int32, copy=False).tobytes(),
        )
        message = join(header, _gather(request.hidden_states, request.tokens))
        self._stream.write(message)
        self._asked.append(((request.step, request.layer, request.attempt), request.num_pairs))
        self.counters.requests += 1
        self.counters.bytes_sent += len(message)

    def receive(self, deadline: float) -> RowsReply | None:
        """As Link."""
        message = self._stream.read(deadline)
        if message is None:
            return None
        self.counters.bytes_received += len(message)
        try:
            return self._decode(message)
        except MalformedMessage as error:
            self.close()
            raise LinkDown(f"{self._stream.address}: {error}") from error

    def close(self) -> None:
        """As Link."""
        self._stream.close()

    def _decode(self, message: bytes) -> RowsReply:
        header, rows = split(message, Rows)
        status = _STATUS_OF.get(header.status)
        if status is None or not self._asked:
            raise MalformedMessage("an answer that nobody asked for" if status else f"status {header.status}")
        tag, num_pairs = self._asked.popleft()
        if tag != (header.step, header.layer, header.attempt):
            raise MalformedMessage("an answer to another request")
        if len(rows) != (num_pairs * self._row_bytes if status is RowsStatus.OK else 0):
            raise MalformedMessage(f"{len(rows)} bytes of rows instead of {num_pairs} rows")
        return RowsReply(
            *tag,
            status=status,
            epoch=header.epoch,
            address=_address(rows),
            owner=rows,
            not_held=tuple(header.not_held),
            compute_seconds=header.compute_nanoseconds * 1e-9,
        )


def _gather(hidden_states: torch.Tensor, tokens: np.ndarray) -> list[memoryview]:
    """The bytes of the rows `tokens`, not copied: one view where they are all rows, one each otherwise."""
    num_tokens, hidden_size = hidden_states.shape
    row = hidden_size * hidden_states.element_size()
    stride = hidden_states.stride(0) * hidden_states.element_size()
    assert hidden_states.stride(1) == 1
    view = memoryview(_bytes_at(hidden_states.data_ptr(), (num_tokens - 1) * stride + row)).cast("B")
    if len(tokens) == num_tokens and stride == row:
        return [view]
    return [view[start : start + row] for start in (tokens.astype(np.int64) * stride).tolist()]
