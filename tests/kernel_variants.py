"""What the tests of the CPU kernels share: every compiled variant that this machine runs, and random tensors."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from experts import kernels
from experts.kernels import compiler, library

VARIANTS = {variant.name: variant for variant in compiler.runnable_variants()}
DTYPES = [torch.float32, torch.bfloat16]

few = settings(max_examples=25, deadline=None, database=None, derandomize=True)


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels of one instruction set serve all calls, with two threads."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compiler.build, VARIANTS.values()))
    library.use(library.Library(VARIANTS[request.param]))
    kernels.set_num_threads(2)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield request.param
    torch.set_num_threads(torch_threads)
    library.use(library.Library(next(iter(VARIANTS.values()))))


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same for the same arguments."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of summation and the rounding of the dtype."""
    rtol, atol = (1e-5, 2e-5) if actual.dtype is torch.float32 else (1.6e-2, 2e-2)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
