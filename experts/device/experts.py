"""The experts of one layer on a device, computing rows that are sorted by expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from experts.device.stacks import Stack, stack
from experts.kernels.expert_table import ExpertWeights
from experts.kernels.reference import silu_mul

_ALIGNMENT = 16  # bytes of a row that torch's grouped product asks for
_HOPPER = (9, 0)  # the first GPUs whose grouped product runs without asking the host


class DeviceExperts:
    """down(silu(gate(x)) * up(x)), each step summed in float32 and rounded to the rows' dtype, as in kernels.moe.

    weights: gate [intermediate, hidden], up [intermediate, hidden] and down [hidden, intermediate] of each expert, in
    their order here; all of one shape. They are copied to the device and held in dtype, or in FP8 if all are FP8.
    dtype: of the rows. Raises ValueError for experts of different shapes, or none.
    """

    def __init__(self, weights: Sequence[ExpertWeights], *, device: torch.device, dtype: torch.dtype) -> None:
        self.num_experts = len(weights)
        self.device, self.dtype = device, dtype
        self._gate_up = stack([(gate, up) for gate, up, _ in weights], device, dtype)
        self._down = stack([(down,) for _, _, down in weights], device, dtype)
        self.hidden_size, self.intermediate_size = weights[0][2].shape
        self.nbytes = self._gate_up.nbytes + self._down.nbytes
        widths = (self.hidden_size, self.intermediate_size)
        self._grouped = has_grouped_product(device, dtype, widths)

    @property
    def capturable(self) -> bool:
        """Whether a call may be part of a CUDA graph: it never waits for the host."""
        return self._grouped

    def __call__(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Expert e computes rows ends[e - 1] to ends[e], the first one from 0.

        rows: [num_rows, hidden] in dtype, contiguous. ends: [num_experts] int32, ascending, on the device. Returns
        [num_rows, hidden]; what comes back for rows from ends[-1] on is undefined.
        """
        product = grouped_product if self._grouped else looped_product
        gate, up = product(rows, self._gate_up, ends).chunk(2, dim=1)
        return product(silu_mul(gate, up), self._down, ends)


def has_grouped_product(device: torch.device, dtype: torch.dtype, widths: Sequence[int]) -> bool:
    """Whether torch computes all experts in one kernel that takes `ends` from the device. widths: of the rows."""
    aligned = all(width * dtype.itemsize % _ALIGNMENT == 0 for width in widths)
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _HOPPER
    return hopper and aligned and dtype is torch.bfloat16


def grouped_product(rows: Tensor, weights: Stack, ends: Tensor) -> Tensor:
    """Each expert's rows by its matrix: [num_rows, in] -> [num_rows, out], without a word to the host."""
    return functional.grouped_mm(rows, weights.whole().transpose(1, 2), offs=ends)


def looped_product(rows: Tensor, weights: Stack, ends: Tensor) -> Tensor:
    """The same, one expert after another. It reads `ends`, so the host waits for the device. Rows past them are 0."""
    out = rows.new_zeros(len(rows), weights.out_features)
    first = 0
    for expert, end in enumerate(ends.tolist()):
        if first < end:
            out[first:end] = functional.linear(rows[first:end], weights.one(expert))
        first = end
    return out
