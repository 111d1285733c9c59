"""Which neurons form an expert, and the gate that chooses among the experts.

A neuron's energy on a token is its squared contribution to the FFN's output: (activation x norm of its down column)^2.
An expert's energy is the sum over its neurons; what a token loses is the energy of the experts that it does not get.
Clusters and gate are fitted to each other, so that what is dropped is small and can be foreseen from the FFN's input:

1. start from the neurons with most energy as the shared ones, and balanced k-means of the others' energy profiles;
2. fit the gate: ridge regression from the FFN's input to the logarithm of each expert's energy;
3. see which experts that gate drops for which token; give each neuron to the expert in which it would lose least (a
   shared one loses nothing), keeping every expert's size; repeat from 2.

docs/decisions/0003-carving.md has what was tried, with perplexities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from router.carve.dense import DenseFFN
from router.carve.layout import Layout

KMEANS_ROUNDS = 8
REFINE_ROUNDS = 8
RIDGE = 1e-3
# Keeps the logarithm of an expert that is silent on some token finite; the mean energy of a token is 1.
SILENT = 1e-9


@dataclass(frozen=True)
class LayerRecipe:
    """One layer's carving.

    permutation: [intermediate] int64, the dense neuron at each new place: the shared ones, then expert 0, expert 1 ...
    gate_weight: [num_experts, hidden], gate_bias: [num_experts] float32: gate_weight @ x + gate_bias is the predicted
    logarithm of the experts' energies, up to a constant that all share.
    """

    permutation: torch.Tensor
    gate_weight: torch.Tensor
    gate_bias: torch.Tensor


def carve_layer(x: torch.Tensor, ffn: DenseFFN, layout: Layout) -> tuple[LayerRecipe, float]:
    """The carving of one FFN, and the share of its energy that calibration tokens lose, from 0 to 1.

    x: [num_tokens, hidden] float32, the FFN's inputs.
    """
    energy = (ffn.activations(x) * ffn.down.norm(dim=0)).square_()
    energy /= energy.sum(1).mean()
    group = _initial_groups(energy, layout)
    ridge = _Ridge(x)
    for _ in range(REFINE_ROUNDS):
        dropped = _dropped(ridge.predict(_log_energy(energy, group, layout)), layout)
        loss = torch.zeros(energy.shape[1], layout.num_experts + 1)
        loss[:, : layout.num_experts] = energy.T @ dropped / len(x)
        if not swap_to_improve(group, loss):
            break
    target = _log_energy(energy, group, layout)
    weight, bias = ridge.fit(target)
    lost = (_dropped(ridge.predict(target), layout) * _expert_energy(energy, group, layout)).sum(1).mean()
    # What all experts have in common changes no choice, but would move the sigmoids away from a half.
    recipe = LayerRecipe(_permutation(group, layout), weight - weight.mean(0), bias - bias.mean())
    return recipe, float(lost)


def swap_to_improve(group: torch.Tensor, loss: torch.Tensor) -> int:
    """Swap neurons between pairs of groups while the sum of loss[neuron, group[neuron]] falls. Sizes stay as they are.

    group: [num_neurons] int64, changed in place. loss: [num_neurons, num_groups]. Returns the number of swaps. One pass
    over all pairs, each brought to its optimum: the neurons that gain most by the move, paired in that order.
    """
    swaps = 0
    num_groups = loss.shape[1]
    for a in range(num_groups):
        for b in range(a + 1, num_groups):
            in_a, in_b = (group == a).nonzero()[:, 0], (group == b).nonzero()[:, 0]
            from_a, order_a = (loss[in_a, b] - loss[in_a, a]).sort()
            from_b, order_b = (loss[in_b, a] - loss[in_b, b]).sort()
            pairs = min(len(in_a), len(in_b))
            count = int((from_a[:pairs] + from_b[:pairs] < -1e-9).sum())
            group[in_a[order_a[:count]]], group[in_b[order_b[:count]]] = b, a
            swaps += count
    return swaps


def _initial_groups(energy: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[intermediate] int64: the expert of each neuron, or num_experts for the shared ones."""
    order = energy.mean(0).argsort(descending=True, stable=True)
    group = torch.full_like(order, layout.num_experts)
    routed = order[layout.shared_size :].sort().values
    profiles = F.normalize(energy[:, routed].sqrt().T, dim=1)
    shuffled = torch.randperm(len(routed), generator=torch.Generator().manual_seed(0))
    of_routed = torch.arange(layout.num_experts).repeat_interleave(layout.expert_size)[shuffled]
    for _ in range(KMEANS_ROUNDS):
        means = torch.stack([profiles[of_routed == expert].mean(0) for expert in range(layout.num_experts)])
        if not swap_to_improve(of_routed, -profiles @ F.normalize(means, dim=1).T):
            break
    group[routed] = of_routed
    return group


def _expert_energy(energy: torch.Tensor, group: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[num_tokens, num_experts]."""
    return energy @ F.one_hot(group, layout.num_experts + 1).to(energy.dtype)[:, : layout.num_experts]


def _log_energy(energy: torch.Tensor, group: torch.Tensor, layout: Layout) -> torch.Tensor:
    return (_expert_energy(energy, group, layout) + SILENT).log()


def _dropped(scores: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[num_tokens, num_experts] float32: 1 where the expert is not among the token's top k."""
    return torch.ones_like(scores).scatter_(1, scores.topk(layout.top_k, dim=1).indices, 0.0)


def _permutation(group: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The shared neurons first, then the experts in order; within a group in the dense model's order."""
    return ((group + 1) % (layout.num_experts + 1)).argsort(stable=True)


class _Ridge:
    """Ridge regression with an intercept, for many targets over the same inputs."""

    def __init__(self, x: torch.Tensor) -> None:
        self._mean = x.mean(0)
        self._centred = x - self._mean
        gram = self._centred.T @ self._centred
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        self._factor = torch.linalg.cholesky(gram)

    def fit(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """target: [num_tokens, n] -> (weight [n, features], bias [n]) of weight @ x + bias."""
        weight = torch.cholesky_solve(self._centred.T @ target, self._factor).T
        return weight, target.mean(0) - weight @ self._mean

    def predict(self, target: torch.Tensor) -> torch.Tensor:
        """The fitted values [num_tokens, n]."""
        weight, bias = self.fit(target)
        return F.linear(self._centred, weight, bias + weight @ self._mean)
