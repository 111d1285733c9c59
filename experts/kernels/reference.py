"""The kernels in plain torch: the slow oracle of the tests, and the stand-in where nothing can be compiled.

Signatures and meaning are those of experts.kernels; math is in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See experts.kernels.linear."""
    result = x.float() @ weight.float().T
    if bias is not None:
        result = result + bias.float()
    if out is not None:
        return out.copy_(result)
    return result.to(out_dtype or x.dtype)
