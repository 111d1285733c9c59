"""Frames on a stream socket: a 4-byte little-endian length and that many bytes."""

from __future__ import annotations

import asyncio
import socket
import struct

_LENGTH = struct.Struct("<I")


def frame(payload: bytes) -> bytes:
    """The payload with its length before it."""
    return _LENGTH.pack(len(payload)) + payload


def read_frame(sock: socket.socket) -> bytes | None:
    """The next payload, or None when the peer has gone."""
    header = _read_exactly(sock, _LENGTH.size)
    return None if header is None else _read_exactly(sock, _LENGTH.unpack(header)[0])


async def read_frame_async(reader: asyncio.StreamReader) -> bytes | None:
    """The next payload, or None when the peer has gone."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _read_exactly(sock: socket.socket, size: int) -> bytes | None:
    buffer = bytearray()
    while len(buffer) < size:
        try:
            piece = sock.recv(size - len(buffer))
        except ConnectionError:
            return None
        if not piece:
            return None
        buffer += piece
    return bytes(buffer)
