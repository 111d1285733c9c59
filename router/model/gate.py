"""The gate: each token's top-k experts and their weights, as `GateSpec` says."""

from __future__ import annotations

import torch

from experts import kernels
from router.model.spec import GateSpec


class Gate:
    """weight: [num_experts, hidden], in float32 where the spec asks for float32 logits. select_bias: [num_experts]."""

    def __init__(self, spec: GateSpec, weight: torch.Tensor, select_bias: torch.Tensor | None) -> None:
        self.spec = spec
        self.weight = weight.float().contiguous() if spec.float32_logits else weight
        self.select_bias = select_bias

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_tokens, hidden] -> topk_ids [num_tokens, k] int32, topk_weights [num_tokens, k] float32."""
        x = hidden_states.float() if self.spec.float32_logits else hidden_states
        return choose(kernels.linear(x, self.weight), self.spec, self.select_bias)


def choose(
    router_logits: torch.Tensor, spec: GateSpec, select_bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The choice from the logits [num_tokens, num_experts], in the order of operations of each family's router."""
    logits = router_logits.float()
    scores = logits.softmax(dim=-1) if spec.score == "softmax" else logits.sigmoid()
    choice = scores if select_bias is None else scores + select_bias
    if spec.topk_groups < spec.num_groups:
        choice = _mask_groups(choice, spec)
    topk_ids = choice.topk(spec.top_k, dim=-1).indices
    topk_weights = scores.gather(1, topk_ids)
    if spec.normalise:
        topk_weights = topk_weights / (_row_sums(topk_weights) + spec.norm_eps)
    if spec.scale != 1.0:
        topk_weights = topk_weights * spec.scale
    if not spec.float32_weights:
        topk_weights = topk_weights.to(router_logits.dtype)
    return topk_ids.int(), topk_weights.float()


def _mask_groups(choice: torch.Tensor, spec: GateSpec) -> torch.Tensor:
    """Experts outside the best groups take the masked value (DeepSeek's node-limited routing)."""
    groups = choice.view(len(choice), spec.num_groups, -1)
    best = groups.topk(1 if spec.group_score == "max" else 2, dim=-1).values
    score = best[..., 0] if spec.group_score == "max" else best[..., 0] + best[..., 1]
    kept = torch.zeros_like(score, dtype=torch.bool)
    kept.scatter_(1, score.topk(spec.topk_groups, dim=-1).indices, True)
    return groups.masked_fill(~kept[:, :, None], spec.masked_value).view_as(choice)


def _row_sums(x: torch.Tensor) -> torch.Tensor:
    """[n, k] -> [n, 1], added from left to right: torch's sum of a row changes its order with the number of rows."""
    return x.cumsum(dim=-1)[:, -1:]
