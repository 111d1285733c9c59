"""One matrix of each expert of a layer, stacked on a device.

`whole` is what a grouped product takes; `one` is what a loop over the experts takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from experts.formats.formats import FP8_BLOCK
from experts.kernels.weight import Fp8Weight, Weight


class Stack(Protocol):
    """num_experts matrices [out, in]. out_features: out."""

    out_features: int

    def whole(self) -> Tensor:
        """All of them, [num_experts, out, in] in the rows' dtype."""
        ...

    def one(self, expert: int) -> Tensor:
        """One of them, [out, in] in the rows' dtype."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        ...


# The weights of one stack: for each expert the matrices that lie below one another in its [out, in].
Matrices = Sequence[Sequence[Weight]]


def stack(matrices: Matrices, device: torch.device, dtype: torch.dtype) -> Stack:
    """FP8 stays FP8 where all of them are; anything else is held in dtype, dequantised if it is of few bits."""
    parts = [part for expert in matrices for part in expert]
    if all(isinstance(part, Fp8Weight) for part in parts):
        return Fp8Stack(matrices, device, dtype)
    return PlainStack(matrices, device, dtype)


class PlainStack:
    """Held as the rows are. One expert's matrices at a time are copied, so no second copy of a layer ever exists."""

    def __init__(self, matrices: Matrices, device: torch.device, dtype: torch.dtype) -> None:
        num_experts, self.out_features, width = _shape(matrices)
        self._values = torch.empty((num_experts, self.out_features, width), dtype=dtype, device=device)
        for into, parts in zip(self._values, matrices, strict=True):
            for rows, part in _places(parts):
                into[rows].copy_(part if isinstance(part, Tensor) else part.float())

    def whole(self) -> Tensor:
        """See Stack."""
        return self._values

    def one(self, expert: int) -> Tensor:
        """See Stack."""
        return self._values[expert]

    @property
    def nbytes(self) -> int:
        """See Stack."""
        return self._values.nbytes


class Fp8Stack:
    """Held in FP8 (e4m3), dequantised for each product in float32 and rounded to dtype.

    A checkpoint's scales are one for each block of 128x128. Here every row has its own copy of those of its blocks,
    [num_experts, out, ceil(in / 128)] float32, so that matrices of any height lie below one another: 3 % more bytes.
    """

    def __init__(self, matrices: Matrices, device: torch.device, dtype: torch.dtype) -> None:
        num_experts, self.out_features, width = _shape(matrices)
        self._dtype = dtype
        shape, blocks = (num_experts, self.out_features, width), -(-width // FP8_BLOCK)
        self._values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        self._scales = torch.empty((*shape[:2], blocks), device=device)
        for expert, parts in enumerate(matrices):
            for rows, part in _places(parts):
                assert isinstance(part, Fp8Weight)
                self._values[expert, rows].copy_(part.values)
                self._scales[expert, rows].copy_(part.scales.repeat_interleave(FP8_BLOCK, dim=0)[: part.shape[0]])

    def whole(self) -> Tensor:
        """See Stack. One expert after another, so that the float32 values of one exist at a time."""
        matrices = torch.empty(self._values.shape, dtype=self._dtype, device=self._values.device)
        for expert, into in enumerate(matrices):
            into.copy_(self._float(expert))
        return matrices

    def one(self, expert: int) -> Tensor:
        """See Stack."""
        return self._float(expert).to(self._dtype)

    @property
    def nbytes(self) -> int:
        """See Stack."""
        return self._values.nbytes + self._scales.nbytes

    def _float(self, expert: int) -> Tensor:
        values, scales = self._values[expert], self._scales[expert]
        return values.float() * scales.repeat_interleave(FP8_BLOCK, dim=1)[:, : values.shape[1]]


def _shape(matrices: Matrices) -> tuple[int, int, int]:
    """[num_experts, out, in] of the stack. Raises ValueError where the experts differ or there are none."""
    shapes = {tuple((part.shape[0], part.shape[1]) for part in parts) for parts in matrices}
    if len(shapes) != 1:
        raise ValueError(f"experts of the shapes {sorted(shapes)} cannot be stacked")
    (shape,) = shapes
    return len(matrices), sum(out for out, _ in shape), shape[0][1]


def _places(parts: Sequence[Weight]) -> list[tuple[slice, Weight]]:
    """The rows of an expert's [out, in] that each matrix takes."""
    places, first = [], 0
    for part in parts:
        places.append((slice(first, first + part.shape[0]), part))
        first += part.shape[0]
    return places
