"""What the bytes of an answer depend on beside the weights."""

from __future__ import annotations

import torch

from experts import kernels


def numerics_id(dtype: torch.dtype) -> str:
    """Names it: kernels, instruction set, torch, and the dtype of the rows. Equal ids give equal bytes."""
    version = ".".join(torch.__version__.split(".")[:2])
    return f"{kernels.numerics_id()}-torch{version}-{str(dtype).removeprefix('torch.')}"
