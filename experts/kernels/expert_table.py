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
    dtype, hidden_size, intermediate_size: those of the weights unless given; needed where no expert is held.
    """

    def __init__(
        self,
        weights: Mapping[int, tuple[Tensor, Tensor, Tensor]],
        num_experts: int,
        *,
        dtype: torch.dtype | None = None,
        hidden_size: int | None = None,
        intermediate_size: int | None = None,
    ) -> None:
        self._weights = dict(weights)
        self.num_experts = num_experts
        if dtype is None or hidden_size is None or intermediate_size is None:
            if not self._weights:
                raise ValueError("a table without experts needs dtype, hidden_size and intermediate_size")
            first = next(iter(self._weights.values()))[0]
            dtype, (intermediate_size, hidden_size) = first.dtype, first.shape
        self.dtype: torch.dtype = dtype
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self._pointers = self._checked_pointers()
        self.gate, self.up, self.down = (ctypes.addressof(array) for array in self._pointers)

    def _checked_pointers(self) -> list[ctypes.Array[ctypes.c_void_p]]:
        """For gate, up and down one pointer per expert of the layer, NULL where it is not held."""
        wide, tall = (self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size)
        pointers = [(ctypes.c_void_p * self.num_experts)() for _ in range(3)]
        for expert, tensors in self._weights.items():
            if not 0 <= expert < self.num_experts:
                raise ValueError(f"expert {expert} is not one of {self.num_experts}")
            for array, tensor, shape in zip(pointers, tensors, (wide, wide, tall), strict=True):
                if tensor.shape != shape or tensor.dtype is not self.dtype or not tensor.is_contiguous():
                    raise ValueError(
                        f"expert {expert}: {tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}; "
                        f"wanted contiguous {self.dtype} {shape}"
                    )
                array[expert] = tensor.data_ptr()
        return pointers

    def __getitem__(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """The gate, up and down weights of an expert. Raises KeyError if it is not held."""
        return self._weights[expert]

    def __contains__(self, expert: int) -> bool:
        """Whether an expert is held."""
        return expert in self._weights

    def not_held(self, topk_ids: Tensor) -> tuple[int, ...]:
        """The ids that are asked for (-1 asks for none) and not held, ascending."""
        return tuple(sorted(set(topk_ids.flatten().tolist()) - self._weights.keys() - {-1}))

    def not_held_error(self, topk_ids: Tensor) -> KeyError:
        """What a kernel raises that was asked for an expert that is not held."""
        return KeyError(f"experts {self.not_held(topk_ids)} are not held, or not among the {self.num_experts}")
