"""What an ordinary step must not do: copy what no topology update will read."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import sparse_kernels as sk
from sparse_kernels.growth import GrowthScorer


def layer_and_input(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "linear":
        return sk.SparseLinear(64, 48, density=0.1, generator=generator), torch.randn(
            9, 64, generator=generator
        )
    return sk.SparseConv2d(8, 6, 3, density=0.1, generator=generator), torch.randn(
        2, 8, 9, 9, generator=generator
    )


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_an_ordinary_step_keeps_no_activation_alive(kind):
    """A peer clones the input and output gradient of every layer on every step."""
    layer, x = layer_and_input(kind)
    h = x * 2
    alive = weakref.ref(h)
    layer(h.requires_grad_()).sum().backward()
    del h
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_scoring_does_not_change_the_step(kind):
    layer, x = layer_and_input(kind)
    results = []
    for scorer in (None, GrowthScorer(layer.topology, 5), GrowthScorer(layer.topology, 5, defer=True)):
        layer.growth = scorer
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad, layer.values.grad.clone(), layer.bias.grad.clone()))
        if scorer is not None:
            assert scorer.observed == 1
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_frozen_layer_is_not_scored(kind):
    layer, x = layer_and_input(kind)
    layer.growth = GrowthScorer(layer.topology, 5)
    layer.values.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    assert layer.growth.observed == 0
    assert layer.values.grad is None


def test_rows_gain_and_lose_capacity():
    """Row counts are free to change; a peer keeps every row's count for ever."""
    layer, _ = layer_and_input("linear")
    topology = layer.topology
    count = int(topology.row_ptr.diff()[0])
    free = torch.ones(64, dtype=torch.bool)
    free[topology.col_idx[:count].long()] = False
    grow = free.nonzero().flatten()[:20]
    layer.update_topology(torch.arange(count, count + 20), grow)
    assert int(topology.row_ptr.diff()[0]) == count + 20
    topology.validate()
