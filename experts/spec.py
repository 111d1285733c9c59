"""What a gate and an expert compute, as values. Torch-free, so that headers can be inspected without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSpec:
    """How a gate picks and weights each token's top-k experts.

    score: of the logits. float32_logits: the gate's matrix product runs in float32 instead of the model's dtype.
    select_bias: a float32 bias added to the scores for the choice only (e_score_correction_bias).
    num_groups, topk_groups: experts outside the best groups count as masked_value; a group's score is its best
    expert (max) or the sum of its best two (top2sum). normalise: weights are divided by (their sum + norm_eps);
    scale multiplies them last. float32_weights: weights stay float32 instead of the model's dtype.
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"]
    float32_logits: bool
    float32_weights: bool
    select_bias: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    group_score: Literal["max", "top2sum"] = "max"
    masked_value: float = float("-inf")
    normalise: bool = False
    norm_eps: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FFNSpec:
    """A routed expert: down(silu(gate(x)) * up(x)).

    hidden_size, intermediate_size: values. num_experts: routed experts in one layer.
    gate_name, up_name, down_name: checkpoint names with {layer} and {expert}; weights are [out, in].
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    gate_name: str = "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"
    up_name: str = "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
    down_name: str = "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"

    @property
    def parameters(self) -> int:
        """Weights in one expert."""
        return 3 * self.hidden_size * self.intermediate_size

    def tensors(self, layer: int, expert: int) -> dict[str, tuple[int, int]]:
        """The checkpoint names of one expert's gate, up and down weights, in that order, with their shapes."""
        wide, tall = (self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size)
        names = (self.gate_name, self.up_name, self.down_name)
        return {
            name.format(layer=layer, expert=expert): shape
            for name, shape in zip(names, (wide, wide, tall), strict=True)
        }
