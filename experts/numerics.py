"""What the bytes of an answer depend on beside the weights."""

from __future__ import annotations

import torch

from experts import kernels
from experts.formats import PLAIN


def numerics_id(dtype: torch.dtype, weight_format: str = PLAIN) -> str:
    """Names it: kernels, instruction set, torch, the dtype of the rows, and the weights' format where they are of few
    bits (experts.formats.Holding). Equal ids give equal bytes."""
    version = ".".join(torch.__version__.split(".")[:2])
    name = f"{kernels.numerics_id()}-torch{version}-{str(dtype).removeprefix('torch.')}"
    return name if weight_format == PLAIN else f"{name}-{weight_format}"
