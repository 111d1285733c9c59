"""One .gguf file: its metadata and tensor table, every length checked against the file before it is believed.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The gguf package
has a reader too, but it trusts the counts and lengths in the file; block sizes and dequantisation are the package's.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from barista.errors import CheckpointError
from experts.checkpoint.types import DOWNLOAD_AGAIN, TensorInfo

DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_NESTED_ARRAYS = 4

# GGUF value type -> struct format; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MIN_ENTRY_BYTES = 8  # no key, string, array or tensor entry is shorter, so a count cannot exceed the file's size / 8


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """metadata: the file's key-value pairs. tensors: by the names in the file, shapes slowest dimension first."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_gguf_header(path: Path) -> GGUFFile:
    """Parse the header. Raises CheckpointError for anything that the file cannot hold."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            if size < 24 or stream.read(4) != b"GGUF":
                raise _broken(path, "it does not start with the GGUF magic.")
            view = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.", DOWNLOAD_AGAIN) from error
    with view:
        return _Parser(path, view, size).parse()


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a valid GGUF file: {what}", DOWNLOAD_AGAIN)


class _Parser:
    """A cursor over the mapped header. Every read goes through `take`, which keeps it inside the file."""

    def __init__(self, path: Path, view: mmap.mmap, size: int) -> None:
        self.path, self.view, self.size, self.position = path, view, size, 4

    def parse(self) -> GGUFFile:
        version = self.scalar("I")
        if version not in (2, 3):
            raise CheckpointError(f"{self.path}: GGUF version {version} is unknown.", "Versions 2 and 3 can be read.")
        num_tensors, num_pairs = self.count("tensors"), self.count("metadata pairs")
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self.string("a metadata key")
            if key in metadata:
                raise _broken(self.path, f"metadata key {key!r} appears twice.")
            metadata[key] = self.value(self.scalar("I"), key)
        entries = [self.tensor_entry() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise _broken(self.path, f"general.alignment is {alignment!r}, not a power of two.")
        data_start = -(-self.position // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, dims, type_id, offset in entries:
            if name in tensors:
                raise _broken(self.path, f"tensor {name} appears twice.")
            if offset % alignment:
                raise _broken(self.path, f"tensor {name}: offset {offset} is not a multiple of {alignment}.")
            tensors[name] = self.tensor(name, dims, type_id, data_start + offset)
        return GGUFFile(self.path, metadata, tensors)

    def take(self, num_bytes: int) -> int:
        """Advance over num_bytes and return where they start."""
        start = self.position
        if num_bytes > self.size - start:
            raise _broken(self.path, f"its header claims {num_bytes} bytes at {start}, the file has {self.size}.")
        self.position += num_bytes
        return start

    def scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self.view, self.take(struct.calcsize(code)))[0]
        # A float32 is written as the shortest decimal that it stands for: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if code == "f" else value

    def count(self, what: str) -> int:
        number: int = self.scalar("Q")
        if number > self.size // _MIN_ENTRY_BYTES:
            raise _broken(self.path, f"its header claims {number} {what} in {self.size} bytes.")
        return number

    def string(self, what: str) -> str:
        length = self.scalar("Q")
        start = self.take(length)
        try:
            return self.view[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _broken(self.path, f"{what} is not valid UTF-8.") from error

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string(key)
        if kind != _ARRAY or depth == MAX_NESTED_ARRAYS:
            raise _broken(self.path, f"{key} has the unknown or too deeply nested type {kind}.")
        item_kind, length = self.scalar("I"), self.scalar("Q")
        if item_kind in _SCALARS:
            dtype = np.dtype(_SCALARS[item_kind]).newbyteorder("<")
            start = self.take(length * dtype.itemsize)
            return np.frombuffer(self.view[start : self.position], dtype=dtype).tolist()
        if length > (self.size - self.position) // _MIN_ENTRY_BYTES:
            raise _broken(self.path, f"{key} claims {length} items in {self.size} bytes.")
        return [self.value(item_kind, key, depth + 1) for _ in range(length)]

    def tensor_entry(self) -> tuple[str, list[int], int, int]:
        """name, dims (fastest first), ggml type, offset within the data."""
        name, num_dims = self.string("a tensor name"), self.scalar("I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise _broken(self.path, f"tensor {name}: {num_dims} dimensions.")
        dims = [self.scalar("Q") for _ in range(num_dims)]
        return name, dims, self.scalar("I"), self.scalar("Q")

    def tensor(self, name: str, dims: list[int], type_id: int, offset: int) -> TensorInfo:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # no other file needs them

        try:
            ggml_type = GGMLQuantizationType(type_id)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: tensor {name}: unknown ggml type {type_id}.") from error
        block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        if dims[0] % block:
            raise _broken(self.path, f"tensor {name}: rows of {dims[0]} do not divide into {ggml_type.name} blocks.")
        nbytes = math.prod(dims) // block * block_bytes
        if offset + nbytes > self.size:
            raise _broken(self.path, f"tensor {name}: ends at byte {offset + nbytes}, the file has {self.size}.")
        shape = tuple(reversed(dims))
        return TensorInfo(name=name, dtype=ggml_type.name, shape=shape, file=self.path, offset=offset, nbytes=nbytes)
