"""Training against a masked-dense float64 simulator: the same masks at every update (drill D16)."""

from __future__ import annotations

import math

import pytest
import torch
from simulator import Layer, MaskedMLP
from torch import nn
from torch.nn import functional as F

import rigl
from sparse_kernels import SparseLinear

STEPS, DELTA_T, T_END, ALPHA = 500, 25, 375, 0.3


def sparse_mlp(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5)
    ).double()
    rigl.sparsify(model, sparsity=0.75, distribution="uniform", dense_first=False)
    return model


def twin(model: nn.Sequential, optimizer: str, lr: float, weight_decay: float) -> MaskedMLP:
    layers = [m for m in model if isinstance(m, SparseLinear)]
    return MaskedMLP(
        [Layer(m.dense_weight().detach(), m.bias.detach().clone(), m.mask()) for m in layers],
        optimizer,
        lr,
        weight_decay,
    )


def assert_same(model: nn.Sequential, oracle: MaskedMLP, step: int) -> None:
    layers = [m for m in model if isinstance(m, SparseLinear)]
    for mine, theirs in zip(layers, oracle.layers, strict=True):
        assert torch.equal(mine.mask(), theirs.mask), f"masks differ at step {step}"
        assert (mine.dense_weight() - theirs.weight).abs().max() <= 1e-10, f"weights differ at step {step}"
        assert (mine.bias - theirs.bias).abs().max() <= 1e-10


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("variant", ["plain", "decay", "accumulation"])
def test_500_steps(seed: int, optimizer: str, variant: str) -> None:
    model = sparse_mlp(seed)
    lr, decay = (0.05, 0.0) if optimizer == "sgd" else (0.005, 0.0)
    if variant == "decay":
        decay = 1e-2
    passes = 4 if variant == "accumulation" else 1
    oracle = twin(model, optimizer, lr, decay)
    if optimizer == "sgd":
        opt: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), lr=lr, momentum=0.9, weight_decay=decay
        )
    else:
        opt = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    updater = rigl.RigL(model, opt, t_end=T_END, delta_t=DELTA_T, alpha=ALPHA)
    data = torch.Generator().manual_seed(seed + 100)
    teacher = torch.randn(5, 12, generator=data, dtype=torch.float64)

    updates, moved, step = 0, 0, 0
    while step < STEPS:
        batches = []
        for _ in range(passes):
            x = torch.randn(16, 12, generator=data, dtype=torch.float64)
            batches.append((x, (x @ teacher.T).argmax(1)))
        opt.zero_grad()
        for x, y in batches:
            (F.cross_entropy(model(x), y) / passes).backward()
        opt.step()
        grads = oracle.gradients(batches)
        if step % DELTA_T == 0 and step <= T_END and updates <= step // DELTA_T:
            before = [layer.mask for layer in oracle.layers]
            oracle.update_topology(grads, ALPHA / 2 * (1 + math.cos(math.pi * step / T_END)))
            updates += 1
            moved += sum(int((a.mask != b).sum()) for a, b in zip(oracle.layers, before, strict=True))
            assert updater.updated
            assert_same(model, oracle, step)
        else:
            oracle.train_step(grads)
            step += 1
            assert not updater.updated
        assert updater.step_count == step
    assert_same(model, oracle, step)
    assert updater.updates == updates == T_END // DELTA_T + 1
    assert moved > 200  # the masks did change


def test_the_oracle_can_tell() -> None:
    """Scores of the last micro-batch only, as a hook-based implementation would have them, are found out."""
    model = sparse_mlp(0)
    oracle = twin(model, "sgd", 0.05, 0.0)
    batches = [(torch.randn(16, 12).double(), torch.randint(5, (16,))) for _ in range(4)]
    before = [layer.mask for layer in oracle.layers]
    weights = [layer.weight.clone() for layer in oracle.layers]
    masks = []
    for used in (batches, batches[-1:]):
        for layer, mask, weight in zip(oracle.layers, before, weights, strict=True):
            layer.mask, layer.weight = mask, weight
        oracle.update_topology(oracle.gradients(used), 0.3)
        masks.append([layer.mask for layer in oracle.layers])
    assert not all(map(torch.equal, *masks))
