"""GB/s and GMAC/s of the CPU kernels beside torch's: python benchmarks/kernels.py [--threads N]

Weights of at most 16 rows' work are taken from a set larger than the caches, as the layers of a model are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from experts import kernels

SHAPES = ((576, 1536), (2048, 5120), (2048, 2048))
ROWS = (1, 4, 16, 512)
LARGER_THAN_CACHES = 200e6  # bytes


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """The best of some runs of at least 50 ms, per call."""
    call()
    best = float("inf")
    for _ in range(repeats):
        start, calls = time.perf_counter(), 0
        while time.perf_counter() - start < 0.05:
            call()
            calls += 1
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def bench_linear(dtype: torch.dtype) -> None:
    """y = x W^T beside torch's F.linear."""
    for width, out in SHAPES:
        size = width * out * dtype.itemsize
        weights = [torch.randn(out, width).to(dtype) for _ in range(max(1, round(LARGER_THAN_CACHES / size)))]
        for n in ROWS:
            x, used = torch.randn(n, width).to(dtype), weights if n <= 16 else weights[:2]

            def every(function: Callable[[Tensor, Tensor], Tensor], x: Tensor = x, used: list[Tensor] = used) -> None:
                for weight in used:
                    function(x, weight)

            ours = seconds(lambda: every(kernels.linear)) / len(used)
            torchs = seconds(lambda: every(functional.linear)) / len(used)
            macs = n * width * out
            print(
                f"linear {dtype!s:15} {width:5} -> {out:5}  n={n:<4} {ours * 1e6:8.0f} us {size / ours / 1e9:5.1f} GB/s"
                f"  {macs / ours / 1e9:6.1f} GMAC/s   torch {torchs * 1e6:8.0f} us  {macs / torchs / 1e9:6.1f} GMAC/s"
            )


def bench_moe(dtype: torch.dtype, hidden: int, intermediate: int, num_experts: int, k: int) -> None:
    """Layers of routed experts, together larger than the caches."""
    size = 3 * hidden * intermediate * dtype.itemsize
    shape = (num_experts, intermediate, hidden)
    layers = []
    for _ in range(max(1, round(LARGER_THAN_CACHES / size / num_experts))):
        gate, up, down = (torch.randn(s).to(dtype) for s in (shape, shape, (num_experts, hidden, intermediate)))
        layers.append(kernels.ExpertTable({e: (gate[e], up[e], down[e]) for e in range(num_experts)}, num_experts))
    for n in ROWS:
        x, used = torch.randn(n, hidden).to(dtype), layers if n <= 16 else layers[:2]
        ids = torch.stack([torch.randperm(num_experts)[:k] for _ in range(n)]).to(torch.int32)
        weights = torch.full((n, k), 1.0 / k)

        def every(x: Tensor = x, ids: Tensor = ids, weights: Tensor = weights, used: list = used) -> None:
            for layer in used:
                kernels.moe(x, ids, weights, layer)

        each = seconds(every) / len(used)
        read = len(set(ids.flatten().tolist())) * size
        print(
            f"moe    {dtype!s:15} {hidden}x{intermediate}, {k} of {num_experts}  n={n:<4} {each * 1e6:8.0f} us"
            f"  {read / each / 1e9:5.1f} GB/s  {n * k * 3 * hidden * intermediate / each / 1e9:6.1f} GMAC/s"
        )


def bench_attention(dtype: torch.dtype, query_heads: int, kv_heads: int, dim: int, context: int) -> None:
    """Decode of one row, and prefill of a whole prompt."""
    block_size = 16
    cache = torch.randn(context // block_size, block_size, 2, kv_heads, dim).to(dtype)
    tables = torch.arange(context // block_size, dtype=torch.int32)[None]
    for n in (1, context):
        q, positions = torch.randn(n, query_heads, dim).to(dtype), torch.arange(context - n, context, dtype=torch.int32)
        seq_ids = torch.zeros(n, dtype=torch.int32)
        arguments = (q, cache[:, :, 0], cache[:, :, 1], tables, seq_ids, positions, dim**-0.5)
        each = seconds(lambda a=arguments: kernels.attention(*a, block_size=block_size))
        pairs = (positions.long() + 1).sum().item()
        print(
            f"attend {dtype!s:15} {query_heads}/{kv_heads} heads of {dim}, context {context}  n={n:<4}"
            f" {each * 1e6:8.0f} us  {2 * pairs * query_heads * dim / each / 1e9:6.1f} GMAC/s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as this process may run on")
    threads = parser.parse_args().threads
    print(kernels.load())
    kernels.set_num_threads(threads)
    if threads:
        torch.set_num_threads(threads)
    x, weight = torch.randn(1, 16), torch.randn(4, 16)
    print(f"overhead of one call: {seconds(lambda: kernels.linear(x, weight)) * 1e6:.1f} us")
    for dtype in (torch.float32, torch.bfloat16):
        bench_linear(dtype)
        bench_moe(dtype, 576, 64, 21, 18)
        bench_moe(dtype, 2048, 768, 16, 8)
        bench_attention(dtype, 9, 3, 64, 1024)


if __name__ == "__main__":
    main()
