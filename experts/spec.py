"""What one expert computes, as a value. Torch-free, so that headers can be inspected without loading anything."""

from __future__ import annotations

from dataclasses import dataclass


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
            name.format(layer=layer, expert=expert): shape for name, shape in zip(names, (wide, wide, tall), strict=True)
        }
