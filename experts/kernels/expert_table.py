"""The routed experts of one layer, as the kernels see them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor


class ExpertTable:
    """Where the weights of one layer's experts are. Holds the tensors (often memory-mapped) alive; copies nothing.

    weights: expert id -> gate [intermediate, hidden], up [intermediate, hidden], down [hidden, intermediate], each
    contiguous, all of one dtype and shape. num_experts: experts in the layer; those not in `weights` are not held here.
    """

    def __init__(self, weights: Mapping[int, tuple[Tensor, Tensor, Tensor]], num_experts: int) -> None:
        self._weights = dict(weights)
        self.num_experts = num_experts
        first = next(iter(self._weights.values()))[0]
        self.dtype: torch.dtype = first.dtype
        self.intermediate_size, self.hidden_size = first.shape
        wide, tall = (self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size)
        pointers = [(ctypes.c_void_p * num_experts)() for _ in range(3)]
        for expert, tensors in self._weights.items():
            if not 0 <= expert < num_experts:
                raise ValueError(f"expert {expert} is not one of {num_experts}")
            for array, tensor, shape in zip(pointers, tensors, (wide, wide, tall), strict=True):
                if tensor.shape != shape or tensor.dtype is not self.dtype or not tensor.is_contiguous():
                    raise ValueError(
                        f"expert {expert}: {tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}; "
                        f"wanted contiguous {self.dtype} {shape}"
                    )
                array[expert] = tensor.data_ptr()
        self.pointers = tuple(pointers)
        self.gate, self.up, self.down = (ctypes.addressof(array) for array in pointers)

    def __getitem__(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """The gate, up and down weights of an expert. Raises KeyError if it is not held."""
        return self._weights[expert]
