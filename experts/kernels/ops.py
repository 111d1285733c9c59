"""The kernels as functions on torch tensors. See the package's docstring for the law that they all keep."""

from __future__ import annotations

import torch
from torch import Tensor

from experts.kernels import reference
from experts.kernels.library import current

# enum bk_dtype of src/barista_kernels.h
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x weight^T + bias, summed in float32 and rounded once. The weight is read in place, at any alignment.

    x: [n, in]; weight: [out, in]; bias: [out]; float32 or bfloat16, all of one dtype, rows contiguous.
    out: [n, out] to write to. out_dtype: x's dtype unless given (float32 for logits). Returns [n, out].
    """
    functions = current()
    if functions is None:
        return reference.linear(x, weight, bias, out=out, out_dtype=out_dtype)
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    dtype = x.dtype
    if out is None:
        out = torch.empty((num_rows, out_features), dtype=out_dtype or dtype)
    assert weight.dtype is dtype
    assert weight.shape[1] == in_features
    assert x.stride(1) == weight.stride(1) == out.stride(1) == 1
    assert out.shape == (num_rows, out_features)
    assert bias is None or (bias.dtype is dtype and bias.is_contiguous() and bias.shape[0] == out_features)
    functions.bk_linear(
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        weight.stride(0),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        num_rows,
        in_features,
        out_features,
        _DTYPES[dtype],
        _DTYPES[out.dtype],
    )
    return out
