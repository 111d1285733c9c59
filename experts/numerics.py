"""What the bytes of an answer depend on beside the weights."""

from __future__ import annotations

import torch

from experts import kernels
from experts.formats import PLAIN


def numerics_id(dtype: torch.dtype, weight_format: str = PLAIN) -> str:
    """Names it: kernels, instruction set, torch, the dtype of the rows, and the weights' format where they are of few
    bits (experts.formats.Holding). Equal ids give equal bytes."""
    return _named(kernels.numerics_id(), dtype, weight_format)


def device_numerics_id(device: torch.device, dtype: torch.dtype, weight_format: str = PLAIN) -> str:
    """The same of a model on a device: torch's own kernels, and the generation of the GPU, such as cuda13.0-sm90."""
    name = device.type
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"cuda{torch.version.cuda}-sm{major}{minor}"
    return _named(name, dtype, weight_format)


def _named(computed_by: str, dtype: torch.dtype, weight_format: str) -> str:
    version = ".".join(torch.__version__.split(".")[:2])
    name = f"{computed_by}-torch{version}-{str(dtype).removeprefix('torch.')}"
    return name if weight_format == PLAIN else f"{name}-{weight_format}"
