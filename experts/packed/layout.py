"""Where each tensor of few bits lies in the packed cache: a pure function of a checkpoint's table. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from barista.cache import cache_root
from experts.checkpoint import Checkpoint, TensorInfo, checkpoint_digest
from experts.checkpoint.names import SCALE_SUFFIX
from experts.formats import FP8, Format
from experts.formats.formats import FP8_BLOCK

PAGE = 4096
ALIGNMENT = 64  # of each tensor: a cache line


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tensors that are packed together, and those beside them that are held in place.

    folder: where the files are, once `convert.prepare` has made them. forms: of all these tensors. contents: of each
    file the tensors to convert, in the order in which they lie. sizes: bytes of each file. tensors: where each tensor
    is found; its dtype is its format's.
    """

    folder: Path
    source: Checkpoint
    forms: Mapping[str, Format]
    contents: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)

    def over(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with this part's tensors in place of its own."""
        return replace(checkpoint, tensors={**checkpoint.tensors, **self.tensors})

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(self.sizes.values())


def plan_part(
    source: Checkpoint,
    name: str,
    weight_format: str,
    forms: Mapping[str, Format],
    files: Mapping[str, Iterable[Iterable[str]]],
) -> Part:
    """The layout of one part.

    name: of its folder within the model's. weight_format: as in `Holding`. forms: of its tensors; others are passed
    over. files: file name -> runs of tensors. A run begins on a page, and its tensors lie side by side.
    """
    folder = packed_folder(source, weight_format) / name if forms else Path()
    contents: dict[str, tuple[str, ...]] = {}
    sizes: dict[str, int] = {}
    tensors: dict[str, TensorInfo] = {}
    for file, runs in files.items():
        end, written = 0, []
        for run in runs:
            end = round_up(end, PAGE)
            for tensor in run:
                form, info = forms.get(tensor), source.tensors[tensor]
                if form is FP8 and info.dtype == "F8_E4M3":
                    tensors[tensor] = replace(info, dtype=FP8.dtype)
                elif form is not None:
                    written.append(tensor)
                    for place in _places(info, form, folder / file, round_up(end, ALIGNMENT)):
                        tensors[place.name] = place
                        end = place.offset + place.nbytes
        if written:
            contents[file], sizes[file] = tuple(written), round_up(end, PAGE)
    return Part(folder=folder, source=source, forms=forms, contents=contents, sizes=sizes, tensors=tensors)


def packed_folder(source: Checkpoint, weight_format: str) -> Path:
    """The folder of one model in one format. A file of the checkpoint that was written to since gives another one."""
    written = [(status.st_size, status.st_mtime_ns) for file in source.files for status in [file.stat()]]
    identity = checkpoint_digest(source) + json.dumps(written).encode()
    return cache_root() / "packed" / f"{hashlib.blake2b(identity, digest_size=8).hexdigest()}-{weight_format}"


def round_up(number: int, multiple: int) -> int:
    """The least multiple that is not below."""
    return -(-number // multiple) * multiple


def _places(info: TensorInfo, form: Format, file: Path, offset: int) -> list[TensorInfo]:
    """Of a tensor; of an FP8 one, of its scales first, which must be aligned."""
    values = replace(
        info, dtype=form.dtype, file=file, offset=offset, nbytes=form.nbytes(info.shape), interleaved_heads=0
    )
    if form is not FP8:
        return [values]
    blocks = tuple(-(-size // FP8_BLOCK) for size in info.shape)
    scales = replace(values, name=info.name + SCALE_SUFFIX, dtype="F32", shape=blocks, nbytes=4 * blocks[0] * blocks[1])
    return [scales, replace(values, offset=offset + scales.nbytes, nbytes=values.nbytes - scales.nbytes)]
