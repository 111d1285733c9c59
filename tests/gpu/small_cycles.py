"""A few small groups on a GPU, for compute-sanitizer: python -m tests.gpu.small_cycles"""

from __future__ import annotations

import itertools

import torch

from experts.expert_parallel.machine import cuda_library
from experts.expert_parallel.shape import ExpertMap, GroupShape
from tests.unit.expert_parallel import Group, arrival, expected, random_tokens, same


def main() -> None:
    """Each kind of wire and of combine, two layers of three ranks."""
    experts = ExpertMap.of([0, 2, 2, 1, 0], 3)
    generator = torch.Generator().manual_seed(0)
    for dtype, wire, combine in itertools.product(
        (torch.float32, torch.bfloat16), ("values", "fp8"), ("exact", "partial")
    ):
        shape = GroupShape(num_ranks=3, num_experts=5, max_local_experts=2, top_k=3, hidden_size=256, max_tokens=8,
                           dtype=dtype, wire=wire, combine=combine, alignment=4)  # type: ignore[arg-type]  # fmt: skip
        group = Group(shape, experts, cuda_library(), "cuda:0")
        for _ in range(2):
            tokens = [random_tokens(generator, count, 256, 5, 3, dtype) for count in (8, 0, 5)]
            for mine, (output, _) in zip(tokens, group.layer(tokens), strict=True):
                assert same(output.cpu(), expected(mine, experts, combine, arrival(shape))[0])
        group.close()
    print("All cycles are right.")


if __name__ == "__main__":
    main()
