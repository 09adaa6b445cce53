"""The growth score is that of the gradient in `values.grad`: no backward pass more, none less."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_loops import backward, batch, masks, tiny
from torch import Tensor, nn
from torch.nn import functional as F

import rigl
import sparse_kernels as sk
from sparse_kernels import SparseConv2d, SparseLinear


def attached(**settings: Any) -> tuple[nn.Sequential, torch.optim.Optimizer, rigl.RigL]:
    model = tiny().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, rigl.RigL(model, optimizer, **{"t_end": 20, "delta_t": 2, **settings})


def double(seed: int) -> tuple[Tensor, Tensor]:
    x, y = batch(seed)
    return x.double(), y


def attack(model: nn.Module) -> None:
    """The gradient of the input alone, as adversarial training takes it."""
    x, y = double(99)
    x.requires_grad_()
    torch.autograd.grad(-5 * F.cross_entropy(model(x + 3), y), x)


def frozen(model: nn.Module) -> None:
    """A pass through the frozen model, as for the generator of a GAN."""
    model.requires_grad_(False)
    x, y = double(98)
    F.cross_entropy(model(x.requires_grad_() + 3), y).backward()
    model.requires_grad_(True)


def thrown_away(model: nn.Module) -> None:
    x, y = double(97)
    F.cross_entropy(model(x + 3), y).backward()
    model.zero_grad()


@pytest.mark.parametrize("settings", [{}, {"grad_accumulation": 1}], ids=["found out", "told"])
@pytest.mark.parametrize("aside", [attack, frozen, thrown_away])
def test_passes_that_do_not_reach_the_gradient_do_not_count(
    aside: Callable[[nn.Module], None], settings: dict[str, int]
) -> None:
    found = []
    for disturbed in (False, True):
        model, optimizer, updater = attached(**settings)
        for seed in range(8):
            optimizer.zero_grad()
            if disturbed:
                aside(model)
            x, y = double(seed)
            F.cross_entropy(model(x), y).backward()
            if disturbed and aside is not thrown_away:
                aside(model)
            optimizer.step()
        assert updater.updates == 3
        found.append(masks(model))
    assert all(map(torch.equal, *found))


def test_passes_aside_leave_nothing_behind() -> None:
    """While a layer waits for its topology batch, other passes must not pile up."""
    model, _, _ = attached()
    kept = []
    for seed in range(5):
        x, _ = double(seed)
        h = (x * 1).requires_grad_()
        kept.append(weakref.ref(h))
        torch.autograd.grad(model(h).sum(), h)
        del h
    gc.collect()
    assert sum(ref() is not None for ref in kept) <= 1


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_gradient_penalty_is_scored_as_the_dense_one(kind: str) -> None:
    """The loss is a function of an input gradient (WGAN-GP): what counts are derivatives of gradients."""
    torch.manual_seed(0)
    layer: Any
    if kind == "linear":
        layer, x = SparseLinear(12, 10, density=0.3, dtype=torch.float64), torch.randn(6, 12).double()
    else:
        layer = SparseConv2d(3, 4, 3, padding=1, density=0.3, dtype=torch.float64)
        x = torch.randn(4, 3, 6, 6).double()

    def penalty(function: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        y = function(leaf).tanh()
        (dx,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        return (dx.flatten(1).norm(dim=1) - 1).square().mean() + 0.1 * y.mean()

    twin = layer.to_dense()
    penalty(twin).backward()
    dense_grad = twin.weight.grad
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    rigl.RigL(layer, optimizer, t_end=10, alpha=0.5)
    penalty(layer).backward()
    torch.testing.assert_close(layer.values.grad, layer.topology.gather(dense_grad), rtol=1e-9, atol=1e-12)
    growth = layer.growth.result()
    inactive = ~layer.mask().flatten()
    wanted = dense_grad.flatten().abs()
    torch.testing.assert_close(growth.scores, wanted[growth.positions], rtol=1e-9, atol=1e-12)
    best = wanted[inactive].sort(descending=True).values[: growth.scores.numel()]
    torch.testing.assert_close(growth.scores.sort(descending=True).values, best, rtol=1e-9, atol=1e-12)
    optimizer.step()


def test_a_backend_that_cannot_score_derivatives_of_gradients_says_so() -> None:
    model, optimizer, updater = attached()
    x, _ = double(0)
    with sk.use_backend("reference"):
        leaf = x.requires_grad_()
        (dx,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        dx.square().sum().backward()
    with pytest.warns(rigl.SkippedUpdateWarning, match="no backward pass of it was seen|derivatives of grad"):
        optimizer.step()
    assert updater.updates == 0


@pytest.mark.parametrize("layout", ["cpu", "gpu"])
def test_buffers_of_the_user_may_be_filled_again_before_the_step(layout: str) -> None:
    """A loader's for the input, a pipeline's for the gradient: scored is what they held at each pass."""
    found = []
    for refill in (False, True):
        torch.manual_seed(0)
        layer = SparseLinear(16, 12, density=0.3, dtype=torch.float64)
        layer.topology = layer.topology._with_layout(layout)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        updater = rigl.RigL(layer, optimizer, t_end=20, delta_t=2, alpha=0.5)
        x, dy = torch.empty(2, 16).double(), torch.empty(2, 12).double()  # few: pairs are kept
        for seed in range(6):
            optimizer.zero_grad()
            for part in range(2):
                g = torch.Generator().manual_seed(2 * seed + part)
                new_x, new_dy = (torch.randn(t.shape, generator=g).double() for t in (x, dy))
                if refill:
                    new_x, new_dy = x.copy_(new_x), dy.copy_(new_dy)
                with sk.use_backend("dense"):
                    layer(new_x).backward(new_dy)
            optimizer.step()
        assert updater.updates == 2
        found.append(layer.mask())
    assert torch.equal(*found)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_compiled_layers_are_scored_by_what_they_were_shown(accumulation: int) -> None:
    """The compiler gives the memory of an output gradient to something else once it was used."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(SparseLinear(32, 32, density=0.3) for _ in range(3))
            self.scales = nn.ParameterList(nn.Parameter(torch.rand(32) + 0.5) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer, scale in zip(self.layers, self.scales, strict=True):
                x = layer(x) * scale
            return x

    torch._dynamo.reset()
    model = Chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rigl.RigL(model, optimizer, t_end=20, grad_accumulation=accumulation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        function = torch.compile(model, fullgraph=True)
        for _ in range(accumulation):
            function(torch.randn(32, 32)).square().sum().backward()
    torch._dynamo.reset()
    for layer in model.layers:
        assert isinstance(layer, SparseLinear)
        assert layer.growth is not None
        assert layer.values.grad is not None
        active = layer.growth.result().active
        torch.testing.assert_close(active, layer.values.grad.abs(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("passes", [2, 8])
def test_accumulated_passes_take_no_more_memory_than_one_dense_gradient(passes: int) -> None:
    """Kept pairs are summed up once they take more, and the score stays that of the sum."""
    torch.manual_seed(0)
    layer = SparseLinear(64, 48, density=0.2, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    rigl.RigL(layer, optimizer, t_end=10, grad_accumulation=passes)
    weight = layer.dense_weight().detach().requires_grad_()
    dense_bytes = 64 * 48 * 8
    for seed in range(passes):
        x = torch.randn(40, 64, generator=torch.Generator().manual_seed(seed)).double()
        layer(x).square().sum().backward()
        F.linear(x, weight, layer.bias.detach()).square().sum().backward()
        assert 0 < layer.growth._gradient.bytes_held <= dense_bytes
    growth, scores = layer.growth.result(), weight.grad.flatten().abs()
    torch.testing.assert_close(growth.scores, scores[growth.positions], rtol=1e-12, atol=0)
    best = scores[~layer.mask().flatten()].sort(descending=True).values[: growth.scores.numel()]
    torch.testing.assert_close(growth.scores.sort(descending=True).values, best, rtol=1e-12, atol=0)


def test_a_layer_used_often_in_one_pass_takes_no_more_either() -> None:
    """As in a recurrent network; scored at once, for it is one pass."""
    torch.manual_seed(0)
    layer = SparseLinear(32, 32, density=0.2, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    rigl.RigL(layer, optimizer, t_end=10, grad_accumulation=1)
    twin, held = layer.to_dense(), []
    for module in (layer, twin):
        h = torch.ones(8, 32, dtype=torch.float64)
        for _ in range(12):
            h = module(h).tanh()
            h.register_hook(lambda _: held.append(layer.growth._shown.bytes_held))
        h.sum().backward()
    assert max(held) <= 32 * 32 * 8
    growth, scores = layer.growth.result(), twin.weight.grad.flatten().abs()
    torch.testing.assert_close(growth.scores, scores[growth.positions], rtol=1e-12, atol=0)


def test_a_gradient_with_an_unseen_part_postpones() -> None:
    """Resumed in the middle of an accumulation: half of the gradient came with the checkpoint."""
    model, optimizer, updater = attached(grad_accumulation=2)
    backward(model.float(), 0)
    states = [part.state_dict() for part in (model, optimizer, updater)]
    gradients = [p.grad.clone() for p in model.parameters()]
    model, optimizer, updater = attached(grad_accumulation=2)
    model.float()
    for part, state in zip((model, optimizer, updater), states, strict=True):
        part.load_state_dict(state)
    for p, grad in zip(model.parameters(), gradients, strict=True):
        p.grad = grad
    before = masks(model)
    backward(model, 1)
    with pytest.warns(rigl.SkippedUpdateWarning, match="holds a backward pass that was not seen"):
        optimizer.step()
    assert all(map(torch.equal, before, masks(model)))
    optimizer.zero_grad()
    backward(model, 2)
    optimizer.step()
    assert updater.updates == 1


def test_an_uneven_number_of_passes() -> None:
    """The most passes seen are expected, so that a short step at the end of an epoch does no harm."""
    model, optimizer, updater = attached(delta_t=3)
    model.float()
    for passes in (4, 4, 4, 1, 4, 4, 4, 4, 1):
        optimizer.zero_grad()
        for seed in range(passes):
            backward(model, seed)
        optimizer.step()
    assert updater.updates == 3
