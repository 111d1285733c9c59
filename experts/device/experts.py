"""The experts of one layer on a device, computing rows that are sorted by expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from experts.device.measure import products_for
from experts.device.stacks import stack
from experts.kernels.expert_table import ExpertWeights


class DeviceExperts:
    """down(silu(gate(x)) * up(x)), each step summed in float32 and rounded to the rows' dtype, as in kernels.moe.

    weights: gate [intermediate, hidden], up [intermediate, hidden] and down [hidden, intermediate] of each expert, in
    their order here; all of one shape. They are copied to the device and held in dtype, or in FP8 if all are FP8.
    dtype: of the rows. products: what computes how many rows. Raises ValueError for experts of different shapes, or
    none.
    """

    def __init__(self, weights: Sequence[ExpertWeights], *, device: torch.device, dtype: torch.dtype) -> None:
        self.num_experts = len(weights)
        self.device, self.dtype = device, dtype
        self._gate_up = stack([(gate, up) for gate, up, _ in weights], device, dtype)
        self._down = stack([(down,) for _, _, down in weights], device, dtype)
        self.hidden_size, self.intermediate_size = weights[0][2].shape
        self.nbytes = self._gate_up.nbytes + self._down.nbytes
        self.products = products_for(self._gate_up, self._down, device, dtype)

    def weights(self, expert: int) -> ExpertWeights:
        """gate, up and down of one of them, on the device: for others that are to hold it too."""
        gate, up = self._gate_up.parts(expert, [self.intermediate_size] * 2)
        (down,) = self._down.parts(expert, [self.hidden_size])
        return gate, up, down

    @property
    def capturable(self) -> bool:
        """Whether a call may be part of a CUDA graph: it never waits for the host."""
        return self.products.capturable

    def __call__(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Expert e computes rows ends[e - 1] to ends[e], the first one from 0.

        rows: [num_rows, hidden] in dtype, contiguous. ends: [num_experts] int32, ascending, on the device. Returns
        [num_rows, hidden]; what comes back for rows from ends[-1] on is undefined.
        """
        return self.products(len(rows)).layer(rows, self._gate_up, self._down, ends)
