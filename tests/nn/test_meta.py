"""Layers on the meta device, as large models are built: shapes now, values later. And default devices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rigl
import sparse_kernels as sk


def build(kind, **options):
    if kind == "linear":
        return sk.SparseLinear(24, 16, density=0.25, **options)
    return sk.SparseConv2d(8, 16, 3, padding=1, density=0.25, **options)


def sample(kind, device="cpu"):
    return torch.randn((5, 24) if kind == "linear" else (2, 8, 6, 7), device=device)


KINDS = pytest.mark.parametrize("kind", ["linear", "conv"])


@KINDS
@pytest.mark.parametrize("how", ["argument", "default device"])
def test_a_layer_on_meta_has_a_pattern_and_no_values(kind, how):
    if how == "argument":
        layer = build(kind, device="meta")
    else:
        with torch.device("meta"):
            layer = build(kind)
    assert layer.values.is_meta
    assert layer.bias.is_meta
    layer.topology.validate()
    assert layer.nnz == layer.values.numel()
    x = sample(kind, "meta").requires_grad_()
    y = layer(x)
    assert y.is_meta
    assert y.shape == build(kind)(sample(kind)).shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.values.grad.shape == layer.values.shape


@KINDS
@pytest.mark.parametrize("assign", [True, False])
def test_values_arrive_by_to_empty_or_by_assignment(kind, assign):
    source, layer = build(kind), build(kind, device="meta")
    if not assign:
        layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert not layer.values.is_meta
    x = sample(kind)
    assert torch.equal(layer(x), source(x))


def test_a_meta_model_is_sparsified_and_back():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
        model = rigl.sparsify(model, sparsity=0.9)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert rigl.summary(model).nnz == 2 * 820
    dense = rigl.densify(model)
    assert all(parameter.is_meta for parameter in dense.parameters())
    assert dense[0].weight.shape == (128, 64)


def test_an_update_under_a_default_device_works_on_the_layers_own():
    model = rigl.sparsify(nn.Sequential(nn.Linear(32, 32)), sparsity=0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = rigl.RigL(model, optimizer, t_end=10, delta_t=1)
    x = torch.ones(4, 32)
    with torch.device("meta"):
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert updater.updates == 2
    model[0].topology.validate()
