"""Rows in a gRPC stream: the bytes on the wire, and the link's promises against a server in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import grpc
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from barista.trust import SERVER_OPTIONS
from barista.v1.experts_pb2 import Dispatch, ExchangeReply, ExchangeRequest, Rows
from experts.link import LinkDown, RowsRequest, RowsStatus
from experts.transport.grpc import ExchangeStream, GrpcLink, MalformedMessage, RowsServer, join, split
from experts.worker.store import Computed
from tests.distributed.workers import TRUST

HIDDEN, TOP_K = 6, 2

dispatches = st.builds(
    Dispatch,
    step=st.integers(0, 2**64 - 1),
    layer=st.integers(0, 2**32 - 1),
    attempt=st.integers(0, 300),
    epoch=st.integers(0, 2**40),
    num_rows=st.integers(0, 1000),
    topk_ids=st.binary(max_size=300),
)
answers = st.builds(
    Rows,
    step=st.integers(0, 2**64 - 1),
    status=st.sampled_from([Rows.STATUS_OK, Rows.STATUS_NOT_HELD]),
    not_held=st.lists(st.integers(0, 1000)),
    compute_nanoseconds=st.integers(0, 2**64 - 1),
)


def as_protobuf(header: Dispatch | Rows, rows: bytes) -> ExchangeRequest | ExchangeReply:
    whole = type(header)()
    whole.CopyFrom(header)
    whole.rows = rows
    return ExchangeRequest(dispatch=whole) if isinstance(whole, Dispatch) else ExchangeReply(rows=whole)


@given(header=dispatches | answers, pieces=st.lists(st.binary(min_size=1, max_size=400), max_size=3))
def test_what_is_joined_is_the_message_that_protobuf_understands(header, pieces):
    message = join(header, [memoryview(piece) for piece in pieces])
    expected = as_protobuf(header, b"".join(pieces))
    assert type(expected).FromString(message) == expected


@given(header=dispatches | answers, rows=st.binary(max_size=400), ours=st.booleans())
def test_what_either_encoder_wrote_is_split_again(header, rows, ours):
    message = join(header, [memoryview(rows)]) if ours else as_protobuf(header, rows).SerializeToString()
    found, there = split(message, type(header))
    assert found == header
    assert bytes(there) == rows


def test_our_own_encoding_is_split_without_a_copy():
    message = join(Dispatch(step=1), [memoryview(b"rows" * 100)])
    _, rows = split(message, Dispatch)
    assert rows.obj is message


@given(st.binary(max_size=60))
def test_noise_is_malformed_or_a_message(noise):
    try:
        header, rows = split(noise, Dispatch)
    except MalformedMessage:
        return
    expected = ExchangeRequest.FromString(noise).dispatch
    assert (header.step, header.layer, bytes(rows)) == (expected.step, expected.layer, expected.rows)


@settings(max_examples=30)
@given(cut=st.integers(0, 200), flip=st.integers(0, 255))
def test_a_damaged_dispatch_is_answered_or_malformed(cut, flip):
    """Nothing else: neither a crash nor a read beyond the message."""
    ids = np.array([[0, -1]], np.int32)
    good = join(Dispatch(step=7, num_rows=1, topk_ids=ids.tobytes()), [memoryview(bytes(4 * HIDDEN))])
    place = cut % len(good)
    server = RowsServer(HIDDEN, TOP_K, torch.float32, lambda *_: Computed(RowsStatus.OK, 0))
    for damaged in (good[:place], good[:place] + bytes([flip]) + good[place + 1 :], good + bytes([flip])):
        with suppress(MalformedMessage):
            server.answer(damaged)


@pytest.mark.parametrize(
    ("num_rows", "ids", "rows"),
    [(0, 0, 0), (1, 8, 4 * HIDDEN - 1), (2, 8, 8 * HIDDEN), (1, 4, 4 * HIDDEN), (2**32 - 1, 8, 4 * HIDDEN)],
)
def test_sizes_that_contradict_each_other_are_malformed(num_rows, ids, rows):
    server = RowsServer(HIDDEN, TOP_K, torch.float32, lambda *_: Computed(RowsStatus.OK, 0))
    with pytest.raises(MalformedMessage):
        server.answer(join(Dispatch(num_rows=num_rows, topk_ids=bytes(ids)), [memoryview(bytes(rows))]))


def double(layer: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor, out: torch.Tensor) -> Computed:
    """Each pair's row is (expert + 2) times the token's."""
    token, place = (topk_ids != -1).nonzero(as_tuple=True)
    out.copy_(hidden_states[token] * (topk_ids[token, place] + 2)[:, None])
    return Computed(RowsStatus.OK, 5)


@contextmanager
def link_to(answer: Callable[[bytes], bytes] | None = None, max_rows: int = 64) -> Iterator[GrpcLink]:
    """A link to a server in this process that answers each message with answer(message)."""
    reply = answer or RowsServer(HIDDEN, TOP_K, torch.float32, double).answer

    def exchange(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        yield from map(reply, requests)

    handlers = {"Exchange": grpc.stream_stream_rpc_method_handler(exchange)}
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads, options=SERVER_OPTIONS)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("barista.v1.Experts", handlers)])
        address = f"127.0.0.1:{TRUST.add_port(server, '127.0.0.1:0')}"
        server.start()
        link = GrpcLink(ExchangeStream(address, TRUST), HIDDEN, TOP_K, torch.float32, max_rows)
        try:
            yield link
        finally:
            link.close()
            server.stop(0).wait()


def request(x: torch.Tensor, tokens: list[int], ids: list[list[int]], step: int = 0) -> RowsRequest:
    array = np.array(ids, np.int32)
    return RowsRequest(step, 3, 1, 0, x, np.array(tokens, np.int32), array, int((array != -1).sum()))


def received(link: GrpcLink, seconds: float = 10.0):
    return link.receive(time.monotonic() + seconds)


def rows_of(reply, num_pairs: int) -> torch.Tensor:
    offset = reply.address - np.frombuffer(reply.owner, np.uint8).ctypes.data
    raw = bytearray(reply.owner)[offset:]
    return torch.frombuffer(raw, dtype=torch.float32).view(num_pairs, HIDDEN)


@pytest.mark.parametrize("tokens", [[0, 1, 2, 3], [0, 2], [3]])
@pytest.mark.parametrize("strided", [False, True])
def test_the_chosen_rows_travel_and_the_answers_come_back_in_order(tokens, strided):
    x = torch.randn(4, 2 * HIDDEN)[:, :HIDDEN] if strided else torch.randn(4, HIDDEN)
    ids = [[1, -1], [-1, 0], [2, 3], [-1, 4]][: len(tokens)]
    with link_to() as link:
        link.send(request(x, tokens, ids))
        reply = received(link)
        pairs = [(token, e) for token, row in zip(tokens, ids, strict=True) for e in row if e != -1]
        assert torch.equal(rows_of(reply, len(pairs)), torch.stack([x[token] * (e + 2) for token, e in pairs]))
        assert (reply.step, reply.layer, reply.attempt, reply.epoch) == (0, 3, 1, 5)


def test_the_link_counts_what_it_sends():
    with link_to() as link:
        link.send(request(torch.ones(1, HIDDEN), [0], [[0, 1]]))
        assert link.outstanding == 1
        received(link)
        assert link.outstanding == 0
        assert link.counters.requests == 1
        assert link.counters.bytes_sent > 4 * HIDDEN
        assert link.counters.bytes_received > 2 * 4 * HIDDEN


def test_eight_requests_may_be_unanswered_and_no_more():
    go = threading.Event()
    server = RowsServer(HIDDEN, TOP_K, torch.float32, double)

    def wait(message: bytes) -> bytes:
        go.wait(10)
        return server.answer(message)

    x = torch.ones(1, HIDDEN)
    with link_to(wait) as link:
        for step in range(link.depth):
            link.send(request(x, [0], [[step, -1]], step))
        with pytest.raises(RuntimeError, match="8"):
            link.send(request(x, [0], [[0, -1]]))
        assert received(link, 0.0) is None
        go.set()
        for step in range(link.depth):
            assert received(link).step == step


def test_a_late_answer_carries_its_own_tag():
    go = threading.Event()
    server = RowsServer(HIDDEN, TOP_K, torch.float32, double)

    def wait(message: bytes) -> bytes:
        go.wait(10)
        return server.answer(message)

    x = torch.ones(1, HIDDEN)
    with link_to(wait) as link:
        link.send(request(x, [0], [[0, -1]], step=1))
        assert received(link, 0.05) is None
        link.send(request(x, [0], [[0, -1]], step=2))
        go.set()
        assert [received(link).step, received(link).step] == [1, 2]


def test_a_message_of_rows_stays_below_a_mebibyte_both_ways():
    with link_to(max_rows=10**6) as link:
        assert 1 << 19 < link.max_rows * TOP_K * HIDDEN * 4 <= 1 << 20
        x = torch.zeros(link.max_rows, HIDDEN)
        link.send(request(x, list(range(link.max_rows)), [[0, 1]] * link.max_rows))
        assert received(link).status is RowsStatus.OK
        assert link.counters.bytes_received < 1.1 * (1 << 20)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"noise",
        join(Rows(step=9, layer=3, attempt=1, status=Rows.STATUS_OK), [memoryview(bytes(4 * HIDDEN))]),
        join(Rows(layer=3, attempt=1, status=Rows.STATUS_OK), [memoryview(bytes(4 * HIDDEN + 1))]),
        join(Rows(layer=3, attempt=1, status=Rows.STATUS_OK), []),
        join(Rows(layer=3, attempt=1), []),
    ],
    ids=["empty", "noise", "another tag", "too many bytes", "no rows", "no status"],
)
def test_an_answer_that_makes_no_sense_ends_the_link(answer):
    with link_to(lambda message: answer) as link:
        link.send(request(torch.ones(1, HIDDEN), [0], [[0, -1]]))
        with pytest.raises(LinkDown, match=r"127\.0\.0\.1"):
            received(link)
        assert link.down


def test_a_wait_ends_when_another_thread_closes_the_link():
    go = threading.Event()

    def hang(message: bytes) -> bytes:
        go.wait(10)
        return b""

    with link_to(hang) as link:
        link.send(request(torch.ones(1, HIDDEN), [0], [[0, -1]]))
        closer = threading.Timer(0.05, link.close)
        closer.start()
        try:
            with pytest.raises(LinkDown):
                received(link, 30.0)
        finally:
            go.set()
            closer.join()
        with pytest.raises(LinkDown):
            link.send(request(torch.ones(1, HIDDEN), [0], [[0, -1]]))


def test_no_thread_is_left_of_a_closed_link():
    before = set(threading.enumerate())

    def left() -> list[str]:
        """Our reader, and those of grpc that take our requests and wait for its events."""
        names = [thread.name for thread in set(threading.enumerate()) - before]
        return [name for name in names if "exchange" in name or "(_run)" in name]

    with link_to() as link:
        link.send(request(torch.ones(1, HIDDEN), [0], [[0, -1]]))
        received(link)
        assert len(left()) == 3
        link.close()
        deadline = time.monotonic() + 10
        while left():
            assert time.monotonic() < deadline
            time.sleep(0.01)
