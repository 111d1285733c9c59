"""A weight matrix as the kernels take it: a plain tensor, or one of few bits."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from experts.formats import FP8, Format, codec
from experts.formats.formats import FP8_BLOCK
from experts.kernels.dtypes import DTYPES, PLAIN_WEIGHTS, ROWS_OF
from experts.kernels.library import current


class TiledWeight:
    """A weight [out, in] in tiles. data: [format.nbytes(shape)] uint8, contiguous, often memory-mapped."""

    def __init__(self, form: Format, shape: tuple[int, int], data: Tensor) -> None:
        assert data.dtype is torch.uint8
        assert data.shape == (form.nbytes(shape),)
        self.format, self.shape, self.data = form, shape, data
        self.parts = (data,)

    @property
    def address(self) -> int:
        """What the kernels are given."""
        return self.data.data_ptr()

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.data.nbytes

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix, as an embedding takes them. ids: [n] integers. Returns [n, in] float32."""
        functions = current()
        if functions is None:
            return torch.from_numpy(codec.decode(self.format, self.data.numpy(), self.shape))[ids.long()]
        wanted = ids.to(torch.int64).contiguous()
        out = torch.empty((len(wanted), self.shape[1]))
        assert not len(wanted) or 0 <= int(wanted.min()) <= int(wanted.max()) < self.shape[0]
        functions.bk_decode(
            self.format.code, self.address, self.shape[1], wanted.data_ptr(), len(wanted), out.data_ptr()
        )
        return out

    def float(self) -> Tensor:
        """The whole matrix, float32 [out, in]."""
        return self.rows(torch.arange(self.shape[0]))


class _Fp8Struct(ctypes.Structure):
    """bk_fp8 of src/barista_kernels.h."""

    _fields_ = (("values", ctypes.c_void_p), ("scales", ctypes.c_void_p))


class Fp8Weight:
    """A weight [out, in] in FP8. values: float8_e4m3fn [out, in]; scales: float32, one for each block of 128x128."""

    format = FP8

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        assert values.dtype is torch.float8_e4m3fn
        assert scales.dtype is torch.float32
        assert values.is_contiguous()
        assert scales.is_contiguous()
        self.shape: tuple[int, int] = (values.shape[0], values.shape[1])
        assert scales.shape == tuple(-(-size // FP8_BLOCK) for size in self.shape)
        self.values, self.scales = values, scales
        self.parts = (values, scales)
        self._struct = _Fp8Struct(values.data_ptr(), scales.data_ptr())
        self.address = ctypes.addressof(self._struct)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.values.nbytes + self.scales.nbytes

    def rows(self, ids: Tensor) -> Tensor:
        """See TiledWeight.rows."""
        ids = ids.long()
        columns = self.scales[ids // FP8_BLOCK].repeat_interleave(FP8_BLOCK, dim=1)[:, : self.shape[1]]
        return self.values.view(torch.uint8)[ids].view(torch.float8_e4m3fn).float() * columns

    def float(self) -> Tensor:
        """The whole matrix, float32 [out, in]."""
        return self.rows(torch.arange(self.shape[0]))


Weight = Tensor | TiledWeight | Fp8Weight


def code_of(weight: Weight) -> int:
    """enum bk_weights."""
    return PLAIN_WEIGHTS[weight.dtype] if isinstance(weight, Tensor) else weight.format.code


def address_of_weight(weight: Weight) -> int:
    """Where the kernels find it. A plain weight's rows must be contiguous."""
    return weight.data_ptr() if isinstance(weight, Tensor) else weight.address


def fits_rows(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether the kernels multiply it with rows of this dtype."""
    return not isinstance(weight, Tensor) or ROWS_OF[weight.dtype] is dtype


def parts_of(weight: Weight) -> tuple[Tensor, ...]:
    """The tensors whose bytes are the weight."""
    return (weight,) if isinstance(weight, Tensor) else weight.parts


def take_rows(weight: Weight, ids: Tensor) -> Tensor:
    """Rows of an embedding [num, in]; ids: [n]. In the weight's dtype; float32 for other formats."""
    return weight.index_select(0, ids) if isinstance(weight, Tensor) else weight.rows(ids)


def encode(form: Format, weight: Tensor) -> Tensor:
    """A matrix [out, in], float32 or bfloat16 and finite, as the format's tiles: uint8 [form.nbytes(shape)].

    Raises CheckpointError for a shape that the format cannot take.
    """
    form.check(tuple(weight.shape))
    functions = current()
    if functions is None:
        return torch.from_numpy(codec.encode(form, weight.float().numpy()))
    weight = weight.contiguous()
    packed = torch.empty(form.nbytes(tuple(weight.shape)), dtype=torch.uint8)
    status = functions.bk_encode(
        form.code,
        weight.data_ptr(),
        DTYPES[weight.dtype],
        *weight.shape,
        packed.data_ptr(),
    )
    assert status == 0, f"{form.name} is not encoded here"
    return packed


def encode_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [out, in] as e4m3 [out, in] and the float32 scales of its 128x128 blocks: each block's largest / 448."""
    out, in_features = weight.shape
    row_blocks, column_blocks = -(-out // FP8_BLOCK), -(-in_features // FP8_BLOCK)
    values = torch.empty((out, in_features), dtype=torch.float8_e4m3fn)
    scales = torch.empty((row_blocks, column_blocks))
    padding = column_blocks * FP8_BLOCK - in_features
    for block in range(row_blocks):
        rows = slice(block * FP8_BLOCK, (block + 1) * FP8_BLOCK)
        w = weight[rows].float()
        padded = torch.nn.functional.pad(w, (0, padding)).view(len(w), column_blocks, FP8_BLOCK)
        scales[block] = (padded.abs().amax((0, 2)) / 448).clamp_min(torch.finfo(torch.float32).tiny)
        values[rows] = (w / scales[block].repeat_interleave(FP8_BLOCK)[:in_features]).to(torch.float8_e4m3fn)
    return values, scales
