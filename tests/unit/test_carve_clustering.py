"""Laws of the clustering and of the fitted gate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.carve.clustering import carve_layer, swap_to_improve
from router.carve.dense import DenseFFN
from router.carve.layout import Layout


def total(group, loss):
    return float(loss.gather(1, group[:, None]).sum())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), num_groups=st.integers(2, 5), size=st.integers(1, 12))
def test_swapping_keeps_every_groups_size_and_never_loses(seed, num_groups, size):
    torch.manual_seed(seed)
    group = torch.arange(num_groups).repeat_interleave(size)
    loss = torch.randn(num_groups * size, num_groups)
    before, sizes = total(group, loss), group.bincount()
    swaps = swap_to_improve(group, loss)
    assert torch.equal(group.bincount(), sizes)
    assert total(group, loss) < before if swaps else total(group, loss) == before


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 12))
def test_two_groups_reach_the_optimum_in_one_pass(seed, size):
    torch.manual_seed(seed)
    group, loss = torch.arange(2).repeat_interleave(size), torch.randn(2 * size, 2)
    swap_to_improve(group, loss)
    # The best half for group 1 are the neurons that prefer it most.
    best = loss[:, 0].sum() + (loss[:, 1] - loss[:, 0]).sort().values[:size].sum()
    assert total(group, loss) == pytest.approx(float(best), abs=1e-4)


@pytest.fixture(scope="module")
def planted():
    """An FFN of 8 routed blocks and a shared one, of 8 neurons each, shuffled. On each token two blocks are silent.

    Which ones is written into the input: one feature per block, and one for the neurons that always fire.
    """
    torch.manual_seed(3)
    num_blocks, size, tokens = 8, 8, 2000
    silent = torch.rand(tokens, num_blocks).argsort(1)[:, :2]
    fires = torch.ones(tokens, num_blocks).scatter_(1, silent, 0.0)
    x = torch.cat([fires, torch.full((tokens, 1), 3.0)], dim=1)
    block = torch.arange(num_blocks + 1).repeat_interleave(size)[torch.randperm(72)]
    gate = torch.nn.functional.one_hot(block, num_blocks + 1).float() * 2
    ffn = DenseFFN(gate, gate.clone(), torch.randn(16, 72))
    return x, ffn, block, fires


def test_planted_experts_are_found_and_silent_ones_dropped(planted):
    x, ffn, block, _ = planted
    layout = Layout(expert_size=8, num_shared=1, num_experts=8, top_k=6)
    recipe, lost = carve_layer(x, ffn, layout)
    carved = block[recipe.permutation].view(9, 8)
    assert (carved == carved[:, :1]).all()
    assert carved[0, 0] == 8, "the neurons that always fire are the shared ones"
    assert lost < 1e-3


def test_the_gate_ranks_silent_experts_last(planted):
    x, ffn, block, fires = planted
    layout = Layout(expert_size=8, num_shared=1, num_experts=8, top_k=6)
    recipe, _ = carve_layer(x, ffn, layout)
    order = block[recipe.permutation].view(9, 8)[1:, 0]
    chosen = (x @ recipe.gate_weight.T + recipe.gate_bias).topk(6).indices
    assert torch.equal(order[chosen].sort().values, fires.topk(6).indices.sort().values)


def test_every_neuron_keeps_exactly_one_place():
    torch.manual_seed(0)
    ffn = DenseFFN(torch.randn(96, 32), torch.randn(96, 32), torch.randn(32, 96))
    layout = Layout(expert_size=8, num_shared=2, num_experts=10, top_k=7)
    recipe, lost = carve_layer(torch.randn(200, 32), ffn, layout)
    assert torch.equal(recipe.permutation.sort().values, torch.arange(96))
    assert 0 < lost < 0.3
    assert recipe.gate_weight.shape == (10, 32)


def test_the_gate_predicts_each_experts_log_energy_without_bias():
    torch.manual_seed(1)
    ffn = DenseFFN(torch.randn(96, 32), torch.randn(96, 32), torch.randn(32, 96) * torch.rand(96) ** 2)
    layout = Layout(expert_size=8, num_shared=2, num_experts=10, top_k=7)
    x = torch.randn(500, 32)
    recipe, _ = carve_layer(x, ffn, layout)
    energy = (ffn.activations(x) * ffn.down.norm(dim=0)).square()[:, recipe.permutation]
    log_energy = energy.view(500, 12, 8).sum(2)[:, 2:].log()
    relative = log_energy - log_energy.mean(1, keepdim=True)
    predicted = x @ recipe.gate_weight.T + recipe.gate_bias
    assert relative.mean(0).std() > 0.1, "experts that differ on average"
    torch.testing.assert_close(predicted.mean(0), relative.mean(0), atol=0.01, rtol=0)
