"""One .safetensors file: a bounded check of its header, before anything maps the file.

Format: u64 little-endian length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data, to which the
offsets are relative (https://huggingface.co/docs/safetensors). The checks are those of the Rust library, made here so
that a lying header is named with its tensor and never reaches a mapping.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from barista.errors import CheckpointError
from experts.checkpoint.types import DOWNLOAD_AGAIN, TensorInfo

MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 8

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


def read_safetensors_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of the file, by name. Raises CheckpointError when the header is not what the file can hold."""
    data_start, entries = _read_entries(file)
    data_bytes = file.stat().st_size - data_start
    tensors = {}
    for name, entry in entries.items():
        if name != "__metadata__":
            tensors[name] = _tensor(file, name, entry, data_start, data_bytes)
    _check_covered(file, tensors, data_start, data_bytes)
    return tensors


def _read_entries(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data starts, and the header's JSON object."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _broken(file, f"its header claims {length} bytes, the file has {size}.")
            header = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}.", DOWNLOAD_AGAIN) from error
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"its header is not valid JSON ({str(error)[:120]}).") from error
    if not isinstance(entries, dict):
        raise _broken(file, "its header is not a JSON object.")
    return 8 + length, entries


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return unique


def _tensor(file: Path, name: str, entry: Any, data_start: int, data_bytes: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(file, f"tensor {name}: needs dtype, shape and two data_offsets.") from error
    if len(shape) > MAX_DIMS or any(type(number) is not int or number < 0 for number in numbers):
        raise _broken(file, f"tensor {name}: shape {shape[:MAX_DIMS]} and offsets must be few non-negative integers.")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{file}: tensor {name}: unknown dtype {dtype!r}.", f"Known: {', '.join(BITS)}.")
    if not begin <= end <= data_bytes:
        raise _broken(file, f"tensor {name}: bytes {begin}..{end} lie outside the {data_bytes} bytes of data.")
    if math.prod(shape) * BITS[dtype] // 8 != end - begin:
        raise _broken(file, f"tensor {name}: {dtype} {list(shape)} does not fill {end - begin} bytes.")
    return TensorInfo(name=name, dtype=dtype, shape=shape, file=file, offset=data_start + begin, nbytes=end - begin)


def _check_covered(file: Path, tensors: dict[str, TensorInfo], data_start: int, data_bytes: int) -> None:
    """The tensors must fill the data without hole or overlap: anything else is a truncated or doctored file."""
    position = data_start
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != position:
            raise _broken(file, f"tensor {info.name}: starts at byte {info.offset}, expected {position}.")
        position += info.nbytes
    if position != data_start + data_bytes:
        raise _broken(file, f"{data_start + data_bytes - position} bytes after the last tensor belong to none.")


def _broken(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file}: not a valid safetensors file: {what}", DOWNLOAD_AGAIN)
