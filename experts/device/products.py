"""The ways to compute a layer's experts, and which of them a device, its libraries and the weights offer.

A product takes rows that are sorted by expert, [num_rows, in] in the rows' dtype, contiguous; the weights of all
experts; and ends [num_experts] int32, ascending, on the device: expert e's rows are ends[e - 1] to ends[e], the first
one's from 0. It returns [num_rows, out], summed in float32 and rounded to the rows' dtype; rows from ends[-1] on are
undefined.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from experts.device.stacks import Fp8Stack, Stack
from experts.kernels.reference import silu_mul

log = logging.getLogger(__name__)

_ALIGNMENT = 16  # bytes of a row that torch's grouped product asks for
_GROUPED = (9, 10)  # major versions on which torch's does not ask the host
_AMPERE, _ADA = (8, 0), (8, 9)


@dataclass(frozen=True, slots=True)
class Product:
    """name: as people and the cache know it. gated: rows by a stack of gate above up, then silu(gate) * up.
    plain: rows by a stack. capturable: neither waits for the host. compile: all that the layer of (row [1, hidden],
    gate_up, down, ends) may need with other rows or experts; None: there is nothing to compile.
    """

    name: str
    gated: Callable[[Tensor, Stack, Tensor], Tensor]
    plain: Callable[[Tensor, Stack, Tensor], Tensor]
    capturable: bool
    compile: Callable[[Tensor, Stack, Stack, Tensor], None] | None = None

    def layer(self, rows: Tensor, gate_up: Stack, down: Stack, ends: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x)) of each expert's rows."""
        return self.plain(self.gated(rows, gate_up, ends), down, ends)


def looped_product(rows: Tensor, weights: Stack, ends: Tensor) -> Tensor:
    """One expert after another. It reads `ends`, so the host waits for the device. Rows past them are 0."""
    out = rows.new_zeros(len(rows), weights.out_features)
    first = 0
    for expert, end in enumerate(ends.tolist()):
        if first < end:
            out[first:end] = functional.linear(rows[first:end], weights.one(expert))
        first = end
    return out


def grouped_product(rows: Tensor, weights: Stack, ends: Tensor) -> Tensor:
    """By torch's own kernel, which takes `ends` from the device. FP8 is dequantised whole: a copy of all experts."""
    return functional.grouped_mm(rows, weights.whole().transpose(1, 2), offs=ends)


def _then_gated(product: Callable[[Tensor, Stack, Tensor], Tensor]) -> Callable[[Tensor, Stack, Tensor], Tensor]:
    def gated(rows: Tensor, weights: Stack, ends: Tensor) -> Tensor:
        return silu_mul(*product(rows, weights, ends).chunk(2, dim=1))

    return gated


LOOP = Product("loop", _then_gated(looped_product), looped_product, capturable=False)
GROUPED = Product("grouped", _then_gated(grouped_product), grouped_product, capturable=True)


@functools.cache
def triton_kernel() -> Product | None:
    """The kernel of grouped_triton. None, and a warning once, where triton is missing or does not load."""
    try:
        from experts.device.grouped_triton import compile_products, triton_gated_product, triton_product
    except (ImportError, OSError) as error:
        log.warning("experts are computed without Triton: %s", error)
        return None
    return Product("triton", triton_gated_product, triton_product, capturable=True, compile=compile_products)


def has_grouped_product(device: torch.device, dtype: torch.dtype, widths: Sequence[int]) -> bool:
    """Whether torch computes all experts in one kernel that takes `ends` from the device. widths: of the rows."""
    aligned = all(width * dtype.itemsize % _ALIGNMENT == 0 for width in widths)
    return _generation(device)[0] in _GROUPED and aligned and dtype is torch.bfloat16


def has_triton_product(device: torch.device, dtype: torch.dtype, *, fp8: bool) -> bool:
    """Whether the GPU has what the kernel of grouped_triton compiles to: tensor cores for bf16, conversion from FP8."""
    return dtype in (torch.bfloat16, torch.float16) and _generation(device) >= (_ADA if fp8 else _AMPERE)


def _generation(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def contenders(device: torch.device, dtype: torch.dtype, stacks: Sequence[Stack]) -> tuple[Product, ...]:
    """The products among which only time decides: none of them asks the host, or makes a copy of a layer's weights."""
    fp8 = any(isinstance(weights, Fp8Stack) for weights in stacks)
    found = []
    if not fp8 and has_grouped_product(device, dtype, _widths(stacks)):
        found.append(GROUPED)
    if has_triton_product(device, dtype, fp8=fp8) and (triton := triton_kernel()):
        found.append(triton)
    return tuple(found)


def last_resort(device: torch.device, dtype: torch.dtype, stacks: Sequence[Stack]) -> Product:
    """What computes them where no contender does."""
    return GROUPED if has_grouped_product(device, dtype, _widths(stacks)) else LOOP


def _widths(stacks: Sequence[Stack]) -> list[int]:
    return [weights.values.shape[2] for weights in stacks]
