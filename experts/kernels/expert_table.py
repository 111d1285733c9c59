"""The routed experts of one layer, as the kernels see them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from experts.kernels.dtypes import DTYPES, ROWS_OF
from experts.kernels.structs import ExpertsStruct
from experts.kernels.weight import Weight, address_of_weight, code_of, fits_rows

ExpertWeights = tuple[Weight, Weight, Weight]


class ExpertTable:
    """Where the weights of one layer's experts are. Holds them (often memory-mapped) alive; copies nothing.

    weights: expert id -> gate [intermediate, hidden], up [intermediate, hidden], down [hidden, intermediate], all of
    one format and shape, plain ones contiguous. num_experts: experts in the layer; those not in `weights` are not held
    here. dtype: of the rows; that which plain weights are multiplied with unless given. hidden_size, intermediate_size:
    those of the weights unless given; needed where no expert is held.
    """

    def __init__(
        self,
        weights: Mapping[int, ExpertWeights],
        num_experts: int,
        *,
        dtype: torch.dtype | None = None,
        hidden_size: int | None = None,
        intermediate_size: int | None = None,
    ) -> None:
        self._weights = dict(weights)
        self.num_experts = num_experts
        first = next(iter(self._weights.values()), (None,))[0]
        if first is not None:
            intermediate_size, hidden_size = intermediate_size or first.shape[0], hidden_size or first.shape[1]
            if dtype is None and isinstance(first, Tensor):
                dtype = ROWS_OF[first.dtype]
        if dtype is None or hidden_size is None or intermediate_size is None:
            raise ValueError("a table needs dtype, hidden_size and intermediate_size unless its weights tell them")
        self.dtype: torch.dtype = dtype
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.code = 0 if first is None else code_of(first)
        self._pointers = self._checked_pointers()
        self.gate, self.up, self.down = (ctypes.addressof(array) for array in self._pointers)
        self.struct = ExpertsStruct(
            gate=self.gate,
            up=self.up,
            down=self.down,
            num_experts=num_experts,
            hidden=hidden_size,
            intermediate=intermediate_size,
            weights=self.code,
            dtype=DTYPES[dtype],
        )

    def _checked_pointers(self) -> list[ctypes.Array[ctypes.c_void_p]]:
        """For gate, up and down one pointer per expert of the layer, NULL where it is not held."""
        wide, tall = (self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size)
        pointers = [(ctypes.c_void_p * self.num_experts)() for _ in range(3)]
        for expert, matrices in self._weights.items():
            if not 0 <= expert < self.num_experts:
                raise ValueError(f"expert {expert} is not one of {self.num_experts}")
            for array, weight, shape in zip(pointers, matrices, (wide, wide, tall), strict=True):
                contiguous = not isinstance(weight, Tensor) or weight.is_contiguous()
                fits = code_of(weight) == self.code and fits_rows(weight, self.dtype)
                if tuple(weight.shape) != shape or not fits or not contiguous:
                    raise ValueError(
                        f"expert {expert}: {_kind(weight)} {tuple(weight.shape)}; wanted {shape}, contiguous, "
                        f"all of one format for rows of {self.dtype}"
                    )
                array[expert] = address_of_weight(weight)
        return pointers

    def __getitem__(self, expert: int) -> ExpertWeights:
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


def _kind(weight: Weight) -> str:
    return f"{weight.dtype}, strides {weight.stride()}," if isinstance(weight, Tensor) else weight.format.name
