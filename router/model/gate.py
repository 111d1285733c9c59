"""The gate: each token's top-k experts and their weights, as `GateSpec` says."""

from __future__ import annotations

import torch

from experts import kernels
from experts.spec import GateSpec


class Gate:
    """weight: [num_experts, hidden], in float32 where the spec asks for float32 logits. select_bias: [num_experts]."""

    def __init__(self, spec: GateSpec, weight: torch.Tensor, select_bias: torch.Tensor | None) -> None:
        self.spec = spec
        self.weight = weight.float().contiguous() if spec.float32_logits else weight
        self.select_bias = select_bias

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_tokens, hidden] -> topk_ids [num_tokens, k] int32, topk_weights [num_tokens, k] float32."""
        x = hidden_states.float() if self.spec.float32_logits else hidden_states
        router_logits = kernels.linear(x, self.weight)
        topk_ids, topk_weights = kernels.gate(router_logits.float(), self.spec, self.select_bias)
        if not self.spec.float32_weights:
            topk_weights = topk_weights.to(router_logits.dtype).float()
        return topk_ids, topk_weights
