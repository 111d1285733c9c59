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
    shape = _shape(spec, num_blocks, block_size)
    pages = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(shape)


def allocate_device_cache(
    spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The same on a device, with one block more, which no sequence owns: rows that pad a step read and write it."""
    return torch.zeros(_shape(spec, num_blocks + 1, block_size), dtype=dtype, device=device)


def nowhere(cache: torch.Tensor) -> int:
    """The last slot of a device's cache, in the block that no sequence owns."""
    return cache.shape[2] * cache.shape[3] - 1


def _shape(spec: ModelSpec, num_blocks: int, block_size: int) -> tuple[int, ...]:
    attention = spec.attention
    if isinstance(attention, GQASpec):
        return (spec.num_layers, 2, num_blocks, block_size, attention.num_kv_heads, attention.head_dim)
    return (spec.num_layers, 1, num_blocks, block_size, 1, attention.kv_values)
