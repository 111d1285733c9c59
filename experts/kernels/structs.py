"""What the structs of src/barista_kernels.h for whole halves of a layer are made of."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from experts.kernels.dtypes import DTYPES
from experts.kernels.weight import Weight, address_of_weight, code_of, fits_rows


class WeightStruct(ctypes.Structure):
    """bk_weight."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("out", ctypes.c_int64),
        ("in_", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("weights", ctypes.c_int32),
    )


class ExpertsStruct(ctypes.Structure):
    """bk_experts."""

    _fields_ = (
        ("gate", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("num_experts", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("weights", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


class NormsStruct(ctypes.Structure):
    """bk_norms."""

    _fields_ = (
        ("attention", ctypes.c_void_p),
        ("ffn", ctypes.c_void_p),
        ("hidden", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    )


def weight_struct(weight: Weight | None, dtype: torch.dtype) -> WeightStruct:
    """A weight beside rows of this dtype, which the caller keeps alive; all zero for None."""
    if weight is None:
        return WeightStruct()
    assert fits_rows(weight, dtype)
    assert not isinstance(weight, Tensor) or weight.is_contiguous()
    return WeightStruct(address_of_weight(weight), *weight.shape, weight.shape[1], code_of(weight))


def weight_structs(weights: Sequence[Weight], dtype: torch.dtype) -> Any:
    """An array of them."""
    return (WeightStruct * len(weights))(*(weight_struct(weight, dtype) for weight in weights))


def norms_struct(attention: Tensor, ffn: Tensor, eps: float) -> NormsStruct:
    """The norms before the attention and before the FFN; weights: [hidden], of the dtype of the layer's rows."""
    assert attention.dtype is ffn.dtype
    return NormsStruct(
        attention=pointer(attention), ffn=pointer(ffn), hidden=len(attention), eps=eps, dtype=DTYPES[attention.dtype]
    )


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a contiguous tensor, which the caller keeps alive; None for None."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()
