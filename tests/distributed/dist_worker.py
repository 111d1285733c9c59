"""A worker of the tests of torch.distributed: `python -m tests.distributed.dist_worker ADDRESS NAME`.

It holds whatever experts it is asked for, made from their numbers, of rows of any dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache

import torch

from experts import kernels
from experts.numerics import numerics_id
from experts.transport.dist import ExpertRows
from experts.transport.dist_agreement import Agreement
from experts.transport.dist_rendezvous import run_worker

HIDDEN, INTERMEDIATE = 40, 24
NUM_EXPERTS = 7
LAYERS = (1, 3, 9)
LAYER_THAT_RAISES = 9
DIGEST = "5eed"


@cache
def weights(layer: int, expert: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * layer + expert)
    shapes = (INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    gate, up, down = (torch.randn(s, generator=generator).div(s[1] ** 0.5).to(dtype) for s in shapes)
    return gate, up, down


def table(layer: int, experts: tuple[int, ...], dtype: torch.dtype) -> kernels.ExpertTable:
    held = {expert: weights(layer, expert, dtype) for expert in experts}
    return kernels.ExpertTable(held, NUM_EXPERTS, dtype=dtype, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE)


def load(agreement: Agreement, experts: Mapping[int, tuple[int, ...]]) -> ExpertRows:
    num_experts = dict.fromkeys(LAYERS, NUM_EXPERTS)
    dtype = getattr(torch, agreement.dtype)
    agreement.require(
        hidden_size=HIDDEN,
        dtype=agreement.dtype,
        num_experts=num_experts,
        numerics_id=numerics_id(dtype),
        digest=DIGEST,
    )
    tables = {layer: table(layer, ids, dtype) for layer, ids in experts.items()}

    def rows(layer: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        if layer == LAYER_THAT_RAISES:
            raise ArithmeticError("as asked")
        return kernels.expert_rows(hidden_states, topk_ids, tables[layer])

    return rows


if __name__ == "__main__":
    kernels.set_num_threads(1)
    run_worker(sys.argv[1], sys.argv[2], load)
