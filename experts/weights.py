"""A checkpoint's tensors as torch tensors: mapped where the stored dtype is the wanted one, converted otherwise.

Of a packed one (experts/packed), matrices of few bits, mapped as well.
"""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import torch

from barista.errors import CheckpointError
from experts.checkpoint import Checkpoint, TensorInfo
from experts.checkpoint.names import SCALE_SUFFIX
from experts.formats import FP8, TILED
from experts.formats.formats import FP8_BLOCK
from experts.kernels.weight import Fp8Weight, TiledWeight, Weight

_TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip

# Without it the kernel refuses a private mapping larger than memory, although almost none of it is ever written.
# The mmap module knows the name from Python 3.13 on.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class WeightReader:
    """Reads tensors by canonical name.

    Each file is mapped once, at its first tensor, and privately: a write into a tensor can never reach the file.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors = checkpoint.tensors
        self._path = checkpoint.path
        self._maps: dict[Path, mmap.mmap] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The tensor `name` of this shape as `dtype`.

        A view of the file if it is stored so. FP8 (e4m3) is multiplied by its `_scale_inv` blocks in float32 first,
        unless FP8 is what is wanted; ggml's block types are dequantised to float32. Then each value is rounded once.
        Raises CheckpointError for a missing tensor, another shape, or FP8 without fitting scales.
        """
        info = self._info(name, shape)
        if info.dtype not in _TORCH_DTYPES:
            tensor = self._dequantise_ggml(info)
        else:
            tensor = self._stored(info)
            if tensor.dtype == torch.float8_e4m3fn and dtype != torch.float8_e4m3fn:
                return dequantise_fp8(tensor, self._fp8_scales(info), dtype)
        if info.interleaved_heads:
            tensor = _deinterleave_rows(tensor, info.interleaved_heads)
        return tensor.to(dtype)

    def weight(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Weight:
        """The matrix `name` as it is held: of few bits where the checkpoint is packed so, otherwise as `get`."""
        info = self._info(name, shape)
        if info.dtype in TILED:
            return TiledWeight(TILED[info.dtype], shape, self._raw(info))
        if info.dtype == FP8.dtype:
            values = self._raw(info).view(torch.float8_e4m3fn).reshape(shape)
            return Fp8Weight(values, self._fp8_scales(info))
        return self.get(name, shape, dtype)

    def blocks(self, name: str) -> np.ndarray:
        """A matrix of ggml's blocks, uint8 [out, bytes of a row], its rows in Hugging Face's order."""
        info = self._tensors[name]
        rows = self._raw(info).view(info.shape[0], -1)
        if info.interleaved_heads:
            rows = _deinterleave_rows(rows, info.interleaved_heads)
        array: np.ndarray = rows.numpy()
        return array

    def _info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self._tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self._path}: tensor {name} is missing.", "Is this the whole model?")
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, expected {list(shape)}.",
                "config.json and the weights do not belong together.",
            )
        return info

    def _stored(self, info: TensorInfo) -> torch.Tensor:
        """The tensor as it lies in the file: a view, or a copy where its bytes are not aligned to its dtype."""
        dtype = _TORCH_DTYPES[info.dtype]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        raw = self._raw(info)
        if info.offset % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).reshape(info.shape)

    def _raw(self, info: TensorInfo) -> torch.Tensor:
        """The tensor's bytes in the file, uint8."""
        return torch.frombuffer(self.map(info.file), dtype=torch.uint8, count=info.nbytes, offset=info.offset)

    def _dequantise_ggml(self, info: TensorInfo) -> torch.Tensor:
        """float32, in the shape of info."""
        import gguf  # no other file needs it

        raw = np.frombuffer(self.map(info.file), dtype=np.uint8, count=info.nbytes, offset=info.offset)
        rows = raw.reshape(*info.shape[:-1], -1)
        try:
            values = gguf.dequantize(rows, gguf.GGMLQuantizationType[info.dtype])
        except NotImplementedError as error:
            raise CheckpointError(
                f"{info.file}: tensor {info.name}: ggml type {info.dtype} is not supported."
            ) from error
        return torch.from_numpy(values.reshape(info.shape))

    def _fp8_scales(self, info: TensorInfo) -> torch.Tensor:
        """The multipliers of an FP8 weight's 128x128 blocks, float32 [ceil(out / 128), ceil(in / 128)]."""
        companion = self._tensors.get(info.name + SCALE_SUFFIX)
        blocks = tuple(-(-size // FP8_BLOCK) for size in info.shape)
        if companion is None or companion.shape != blocks:
            found = "is missing" if companion is None else f"has shape {list(companion.shape)}"
            raise CheckpointError(
                f"{info.file}: FP8 tensor {info.name}: {info.name}{SCALE_SUFFIX} {found}, expected {list(blocks)}.",
                "Only FP8 with 128x128 block scales is supported.",
            )
        scales = self._stored(companion)
        if scales.dtype == torch.uint8:  # ue8m0 exponents under the dtype that older safetensors had for them
            scales = scales.view(torch.float8_e8m0fnu)
        return scales.to(torch.float32)

    def map(self, file: Path) -> mmap.mmap:
        """The mapping of a file, which every tensor that is a view of it shares."""
        if file not in self._maps:
            with file.open("rb") as stream:
                self._maps[file] = mmap.mmap(
                    stream.fileno(), 0, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
        return self._maps[file]


def dequantise_fp8(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight[i, j] * scales[i // 128, j // 128] in float32, rounded to dtype.

    weight: [out, in] float8_e4m3fn. scales: [ceil(out / 128), ceil(in / 128)] float32; the last blocks may be partial.
    Source: DeepSeek-V3's inference code, where "scale_inv" is the multiplier. One block row at a time, so that the
    float32 copy of a large matrix never exists.
    """
    out = torch.empty(weight.shape, dtype=dtype)
    for index, row_scales in enumerate(scales):
        rows = slice(index * FP8_BLOCK, (index + 1) * FP8_BLOCK)
        columns = row_scales.repeat_interleave(FP8_BLOCK)[: weight.shape[1]]
        out[rows] = (weight[rows].to(torch.float32) * columns).to(dtype)
    return out


def _deinterleave_rows(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's converter: within each head, rows (0, half, 1, half + 1, ...) return to (0, 1, 2, ...)."""
    per_head = tensor.reshape(num_heads, tensor.shape[0] // num_heads // 2, 2, *tensor.shape[1:])
    return per_head.swapaxes(1, 2).reshape(tensor.shape)
