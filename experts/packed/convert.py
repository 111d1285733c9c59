"""Fills the packed cache: one tensor at a time, so that memory never holds more than one beside the mapped files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from barista.cache import new_directory
from barista.errors import CheckpointError
from experts import kernels
from experts.checkpoint import TensorInfo
from experts.formats import FP8, KEPT_FROM_GGUF, Format
from experts.formats.codec import from_ggml
from experts.packed import index
from experts.packed.layout import Part
from experts.weights import WeightReader

log = logging.getLogger(__name__)

Progress = Callable[[float, str], None]


def prepare(part: Part, report: Progress = lambda fraction, message: None) -> None:
    """Return once the files of the part are there, made by this process or another one.

    report: told how far this process is, 0..1. A conversion that was killed goes on where it was, file by file. A
    folder that is damaged, or of another layout, is made again, with a warning that says so.
    Raises CheckpointError for a tensor that cannot be read or is not finite, CacheError when the disk is full.
    """
    if not part.sizes or index.problem(part.folder, part) is None:
        return
    report(0.0, f"packing weights to {part.folder}")
    with new_directory(part.folder, part.nbytes, resume=True, usable=lambda folder: _usable(folder, part)) as folder:
        if folder is not None:
            _fill(folder, part, report)


def _usable(folder: Path, part: Part) -> bool:
    reason = index.problem(folder, part)
    if reason is not None:
        log.warning("The packed weights in %s cannot be used, and are made again: %s.", folder, reason)
    return reason is None


def _fill(folder: Path, part: Part, report: Progress) -> None:
    if not index.begin(folder, part):
        for file in part.sizes:
            (folder / file).unlink(missing_ok=True)
    reader = WeightReader(part.source)
    done = 0
    for file, size in part.sizes.items():
        report(done / part.nbytes, f"packing {file.removesuffix('.bin')}")
        if not (folder / file).exists():
            _write_file(folder / file, part, reader)
        done += size
    index.finish(folder, part)


def _write_file(path: Path, part: Part, reader: WeightReader) -> None:
    """Written under another name, so that a file that is there is whole."""
    partial = path.with_name(f".{path.name}")
    try:
        with partial.open("wb") as stream:
            for name in part.contents[path.name]:
                _write_tensor(stream, part, name, reader)
            stream.truncate(part.sizes[path.name])
            stream.flush()
            os.fsync(stream.fileno())  # a crash of the machine must not leave the name without the bytes
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_tensor(stream: BinaryIO, part: Part, name: str, reader: WeightReader) -> None:
    pieces = encoded(reader, part.source.tensors[name], part.forms[name])
    place = part.tensors[name]
    stream.seek(place.offset + place.nbytes - sum(piece.nbytes for piece in pieces))
    stream.writelines(piece.numpy().data for piece in pieces)


def encoded(reader: WeightReader, info: TensorInfo, form: Format) -> tuple[torch.Tensor, ...]:
    """A tensor's bytes in a format, uint8, in the order in which they are packed: of FP8 the scales first.

    Blocks of ggml that the format holds are rearranged; all others are decoded, from float16 to float32, and encoded.
    Raises CheckpointError if a value is not finite.
    """
    if KEPT_FROM_GGUF.get(info.dtype) is form:
        blocks = reader.blocks(info.name)
        _require_finite(info, torch.from_numpy(_scales_of_blocks(blocks, form)))
        return (torch.from_numpy(from_ggml(form, blocks)),)
    weight = reader.get(info.name, info.shape, torch.bfloat16 if info.dtype == "BF16" else torch.float32)
    _require_finite(info, weight)
    if form is FP8:
        values, scales = kernels.encode_fp8(weight)
        return scales.view(torch.uint8), values.view(torch.uint8)
    return (kernels.encode(form, weight),)


def _scales_of_blocks(blocks: np.ndarray, form: Format) -> np.ndarray:
    """float16 [blocks]: each of ggml's blocks of 32 begins with its scale."""
    block_bytes = 34 if form is KEPT_FROM_GGUF["Q8_0"] else 18
    return np.ascontiguousarray(blocks.reshape(-1, block_bytes)[:, :2]).view(np.float16)


def _require_finite(info: TensorInfo, values: torch.Tensor) -> None:
    extremes = values.aminmax()  # NaN if any value is; and many times faster than isfinite
    if not (extremes.min.isfinite() and extremes.max.isfinite()):
        raise CheckpointError(
            f"{info.file}: tensor {info.name} holds values that are not finite.",
            "The checkpoint is damaged: download it again with: barista pull NAME",
        )
