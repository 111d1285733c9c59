"""One matrix of each expert of a layer, stacked on a device.

`whole` is what torch's grouped product takes, `one` what a loop over the experts takes; the Triton kernel takes them as
they are held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from experts.formats.formats import FP8_BLOCK
from experts.kernels.weight import Fp8Weight, Weight


class Stack(Protocol):
    """num_experts matrices [out, in]. out_features: out. values: [num_experts, out, in] as held, contiguous."""

    out_features: int
    values: Tensor

    def whole(self) -> Tensor:
        """All of them, [num_experts, out, in] in the rows' dtype."""
        ...

    def one(self, expert: int) -> Tensor:
        """One of them, [out, in] in the rows' dtype."""
        ...

    def parts(self, expert: int, heights: Sequence[int]) -> tuple[Weight, ...]:
        """One of them as the matrices that it was made of, of these heights, on the device."""
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
        self.values = torch.empty((num_experts, self.out_features, width), dtype=dtype, device=device)
        for into, parts in zip(self.values, matrices, strict=True):
            for rows, part in _places(parts):
                into[rows].copy_(part if isinstance(part, Tensor) else part.float())

    def whole(self) -> Tensor:
        """See Stack."""
        return self.values

    def one(self, expert: int) -> Tensor:
        """See Stack."""
        return self.values[expert]

    def parts(self, expert: int, heights: Sequence[int]) -> tuple[Weight, ...]:
        """See Stack."""
        return torch.split(self.values[expert], list(heights))

    @property
    def nbytes(self) -> int:
        """See Stack."""
        return self.values.nbytes


class Fp8Stack:
    """Held in FP8 (e4m3). `whole` and `one` dequantise in float32 and round to dtype.

    A checkpoint's scales are one for each block of 128x128. Here they are one for rows_per_scale rows and 128 columns,
    scales: [num_experts, out / rows_per_scale, ceil(in / 128)] float32. That is 128 rows too, where the matrices that
    lie below one another have whole blocks; else as many as divide the heights of all and 128.
    """

    def __init__(self, matrices: Matrices, device: torch.device, dtype: torch.dtype) -> None:
        num_experts, self.out_features, width = _shape(matrices)
        self._dtype = dtype
        shape, blocks = (num_experts, self.out_features, width), -(-width // FP8_BLOCK)
        self.values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        self.rows_per_scale = math.gcd(FP8_BLOCK, *(part.shape[0] for part in matrices[0]))
        self.scales = torch.empty((num_experts, self.out_features // self.rows_per_scale, blocks), device=device)
        for expert, parts in enumerate(matrices):
            for rows, part in _places(parts):
                assert isinstance(part, Fp8Weight)
                self.values[expert, rows].copy_(part.values)
                scaled = slice(rows.start // self.rows_per_scale, rows.stop // self.rows_per_scale)
                copies = part.scales.repeat_interleave(FP8_BLOCK // self.rows_per_scale, dim=0)
                self.scales[expert, scaled].copy_(copies[: scaled.stop - scaled.start])

    def whole(self) -> Tensor:
        """See Stack. One expert after another, so that the float32 values of one exist at a time."""
        matrices = torch.empty(self.values.shape, dtype=self._dtype, device=self.values.device)
        for expert, into in enumerate(matrices):
            into.copy_(self._float(expert))
        return matrices

    def one(self, expert: int) -> Tensor:
        """See Stack."""
        return self._float(expert).to(self._dtype)

    def parts(self, expert: int, heights: Sequence[int]) -> tuple[Weight, ...]:
        """See Stack."""
        values = torch.split(self.values[expert], list(heights))
        scales = torch.split(self.scales[expert], [height // self.rows_per_scale for height in heights])
        step = FP8_BLOCK // self.rows_per_scale
        return tuple(Fp8Weight(v, s[::step].contiguous()) for v, s in zip(values, scales, strict=True))

    @property
    def nbytes(self) -> int:
        """See Stack."""
        return self.values.nbytes + self.scales.nbytes

    def _float(self, expert: int) -> Tensor:
        values = self.values[expert]
        scales = self.scales[expert].repeat_interleave(self.rows_per_scale, dim=0)
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
