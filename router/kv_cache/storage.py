"""The tensors behind the block table."""

from __future__ import annotations

import math

import numpy as np
import torch

from router.model.spec import GQASpec, ModelSpec


def allocate_cache(spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros [num_layers, planes, num_blocks, block_size, heads, values].

    Grouped-query attention has two planes, keys and values; latent attention one of one head, latent and rotated key.
    numpy's zeros, unlike torch's, are untouched pages: a block costs memory only once it is used.
    """
    attention = spec.attention
    if isinstance(attention, GQASpec):
        shape = (2, num_blocks, block_size, attention.num_kv_heads, attention.head_dim)
    else:
        shape = (1, num_blocks, block_size, 1, attention.kv_values)
    pages = np.zeros(spec.num_layers * math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(spec.num_layers, *shape)
