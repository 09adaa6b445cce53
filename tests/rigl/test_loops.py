"""The training loops people write: optimizers, closures, AMP, accumulation, schedulers, shared layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import rigl
from sparse_kernels import SparseLinear

OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[str, ...]]] = {
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), ("momentum_buffer",)),
    "nesterov": (
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
        ("momentum_buffer",),
    ),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01), ("exp_avg", "exp_avg_sq")),
    "amsgrad": (
        lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    ),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), ("exp_avg", "exp_avg_sq")),
    "adamw-fused": (lambda p: torch.optim.AdamW(p, lr=0.01, fused=True), ("exp_avg", "exp_avg_sq")),
    "rmsprop": (
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
        ("square_avg", "grad_avg", "momentum_buffer"),
    ),
    "adafactor": (lambda p: torch.optim.Adafactor(p, lr=0.01), ()),
}


def tiny(block_size: int = 1, sparsity: float = 0.8, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        SparseLinear(16, 24, density=1 - sparsity, block_size=block_size),
        nn.ReLU(),
        SparseLinear(24, 8, density=1 - sparsity, block_size=block_size),
    )


def batch(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(16, 16, generator=g), torch.randint(8, (16,), generator=g)


def backward(model: nn.Module, seed: int) -> Tensor:
    x, y = batch(seed)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def masks(model: nn.Module) -> list[Tensor]:
    return [m.mask() for m in model.modules() if isinstance(m, SparseLinear)]


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All that training changes, cloned."""
    found = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        found += [t.clone() for _, t in sorted(optimizer.state[p].items()) if isinstance(t, Tensor)]
    return found + masks(model)


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_follows_the_topology(name: str, block_size: int) -> None:
    build, keys = OPTIMIZERS[name]
    model = tiny(block_size)
    optimizer = build(model.parameters())
    updater = rigl.RigL(model, optimizer, begin=3, t_end=50, delta_t=50, alpha=0.5)
    layer = model[0]
    for seed in range(3):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()
    state = optimizer.state[layer.values]
    old = dict(zip(layer.topology.positions().tolist(), range(layer.topology.n_blocks), strict=True))
    before = {k: v.clone() for k, v in state.items() if isinstance(v, Tensor)}
    bias = {k: v.clone() for k, v in optimizer.state[layer.bias].items() if isinstance(v, Tensor)}
    optimizer.zero_grad()
    backward(model, 3)
    optimizer.step()
    assert updater.updated
    assert set(keys) <= state.keys()
    new = layer.topology.positions().tolist()
    assert 0 < len(set(new) - set(old)) < len(new)
    for key, tensor in before.items():
        if tensor.dim() == 0:
            assert torch.equal(state[key], tensor), key  # Adam's step counter
            continue
        for i, p in enumerate(new):
            expected = tensor[old[p]] if p in old else torch.zeros_like(tensor[0])
            assert torch.equal(state[key][i], expected), key
    for key, tensor in bias.items():
        assert torch.equal(optimizer.state[layer.bias][key], tensor), key
    backward(model, 4)
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_lbfgs_is_refused_by_name_except_without_updates() -> None:
    model = tiny()
    optimizer = torch.optim.LBFGS(model.parameters())
    for method in (rigl.RigL, rigl.SET):
        with pytest.raises(TypeError, match="LBFGS keeps one flat history"):
            method(model, optimizer, t_end=10)
    updater = rigl.Static(model, optimizer, t_end=10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model, 0)

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    assert updater.step_count == 2


class Oddity(torch.optim.Optimizer):
    """Keeps state that no topology can be followed by."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["sketch"] = torch.zeros(7)
                    p -= 0.01 * p.grad


def test_state_of_another_shape_is_refused_before_anything_changes() -> None:
    model = tiny()
    optimizer = Oddity(model.parameters())
    rigl.RigL(model, optimizer, begin=1, t_end=10)
    backward(model, 0)
    optimizer.step()
    before = everything(model, optimizer)
    optimizer.zero_grad()
    backward(model, 1)
    with pytest.raises(RuntimeError, match=r"Oddity keeps state 'sketch' of shape \(7,\) .* layer '0'"):
        optimizer.step()
    assert all(map(torch.equal, before, everything(model, optimizer)))


class Closure:
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        self.model, self.optimizer, self.seed = model, optimizer, seed
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        assert torch.is_grad_enabled()
        self.optimizer.zero_grad()
        return backward(self.model, self.seed)


@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_a_closure_does_as_a_loop(name: str, how: str) -> None:
    build, _ = OPTIMIZERS[name]
    results = []
    for use_closure in (False, True):
        model = tiny()
        optimizer = build(model.parameters())
        updater = rigl.RigL(model, optimizer, t_end=12, delta_t=3)
        losses = []
        for seed in range(14):
            closure = Closure(model, optimizer, seed)
            if not use_closure:
                losses.append(closure())
                assert optimizer.step() is None
            elif how == "positional":
                losses.append(optimizer.step(closure))
            else:
                losses.append(optimizer.step(closure=closure))
            assert closure.calls == 1
        assert updater.updates == 4
        results.append([*everything(model, optimizer), *losses])
    assert all(map(torch.equal, *results))


def test_accumulation_scores_the_summed_gradient() -> None:
    """Four micro-batches choose the masks of one batch made of them."""
    found = []
    for passes in (1, 4):
        model = tiny().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        updater = rigl.RigL(model, optimizer, t_end=12, delta_t=3)
        for seed in range(14):
            optimizer.zero_grad()
            x, y = batch(seed)
            for part in torch.arange(16).chunk(passes):
                (F.cross_entropy(model(x[part].double()), y[part]) / passes).backward()
            optimizer.step()
        assert updater.updates == 4
        found.append(masks(model))
    assert all(map(torch.equal, *found))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in its compiler
def test_compiled_in_one_graph_topology_batches_included() -> None:
    """Drill D44: one graph for ordinary steps, one for those that are scored, and the weights of eager."""
    torch._dynamo.reset()
    found, graphs = [], []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    for compiled in (False, True):
        model = tiny().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        updater = rigl.RigL(model, optimizer, t_end=200, delta_t=2)
        function = torch.compile(model, fullgraph=True, backend=counting) if compiled else model
        for seed in range(16):
            x, y = batch(seed)
            optimizer.zero_grad()
            F.cross_entropy(function(x.double()), y).backward()
            optimizer.step()
        assert updater.updates == 6
        found.append([p.detach() for p in model.parameters()] + masks(model))
    assert len(graphs) == 2
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_one_pass_is_scored_at_once_several_are_kept() -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rigl.RigL(model, optimizer, t_end=20, delta_t=2)
    layer = model[0]
    assert layer.growth.defer  # nothing known yet
    for seed in range(3):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()
    assert not layer.growth.defer
    told = tiny()
    rigl.RigL(told, torch.optim.SGD(told.parameters(), lr=0.1), t_end=20, grad_accumulation=1)
    assert not told[0].growth.defer


def test_accumulation_that_starts_later_postpones_one_update() -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = rigl.RigL(model, optimizer, begin=1, t_end=20, delta_t=5, grad_accumulation=1)

    def step(passes: int) -> None:
        optimizer.zero_grad()
        for seed in range(passes):
            backward(model, seed)
        optimizer.step()

    step(1)
    before = masks(model)
    with pytest.warns(rigl.SkippedUpdateWarning, match="postponed by a step at step 1: layer '0'"):
        step(2)
    assert (updater.step_count, updater.updates, updater.updated) == (2, 0, False)
    assert all(map(torch.equal, before, masks(model)))
    step(2)
    assert (updater.step_count, updater.updates, updater.updated) == (2, 1, True)
    assert not all(map(torch.equal, before, masks(model)))


def test_a_layer_used_twice_in_one_pass() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(16, 16).double()
    layer = SparseLinear.from_dense(dense, density=0.2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    updater = rigl.RigL(layer, optimizer, t_end=50, delta_t=2, alpha=0.5, schedule="constant")
    for seed in range(9):
        x = batch(seed)[0].double()
        weight = layer.dense_weight().detach().requires_grad_()
        bias = layer.bias.detach()
        F.linear(F.linear(x, weight, bias).tanh(), weight, bias).square().sum().backward()
        score = weight.grad.abs().flatten()
        old, values = layer.topology.positions(), layer.values.detach().clone()
        optimizer.zero_grad()
        layer(layer(x).tanh()).square().sum().backward()
        optimizer.step()
        if updater.updated:
            k = layer.nnz // 2
            kept = old[values.abs().sort(stable=True).indices[k:]]
            score[kept] = -1
            grown = score.sort(descending=True, stable=True).indices[:k]
            assert layer.topology.positions().tolist() == sorted([*kept.tolist(), *grown.tolist()])
    assert updater.updates == 3


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_pass_whose_gradient_was_thrown_away_does_not_count(set_to_none: bool) -> None:
    found = []
    for strays in (0, 2):
        model = tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        updater = rigl.RigL(model, optimizer, t_end=20, delta_t=3)
        for seed in range(9):
            for stray in range(strays):
                optimizer.zero_grad(set_to_none)
                backward(model, 100 + seed + stray)
            optimizer.zero_grad(set_to_none)
            backward(model, seed)
            optimizer.step()
        assert updater.updates == 3
        found.append(masks(model))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_grad_scaler_skips_moves_nothing(fused: bool) -> None:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    updater = rigl.RigL(model, optimizer, t_end=30, delta_t=2)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10)
    skipped = 0
    for seed in range(50):
        overflow = seed % 3 == 2  # falls on update steps and on others
        before, count, updates = everything(model, optimizer), updater.step_count, updater.updates
        optimizer.zero_grad()
        x, y = batch(seed)
        loss = F.cross_entropy(model(x), y)
        scaler.scale(loss * (float("inf") if overflow else 1.0)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            skipped += 1
            assert all(map(torch.equal, before, everything(model, optimizer)))
            assert (updater.step_count, updater.updates) == (count, updates)
    assert skipped == 16
    assert (updater.updates, updater.step_count) == (12, 22)
    assert updater.failed_updates == 0
    assert all(p.isfinite().all() for p in model.parameters())


def test_lr_scheduler_built_after() -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = rigl.RigL(model, optimizer, t_end=20, delta_t=2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns if it believes that step() was bypassed
        for seed in range(10):
            optimizer.zero_grad()
            backward(model, seed)
            optimizer.step()
            scheduler.step()
    assert updater.updates == 4
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def test_parameter_groups_keep_gradients_and_settings() -> None:
    model = tiny()
    weights = [m.values for m in model if isinstance(m, SparseLinear)]
    biases = [m.bias for m in model if isinstance(m, SparseLinear)]
    optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": 0.1}, {"params": biases}], lr=0.1, momentum=0.9
    )
    updater = rigl.RigL(model, optimizer, t_end=20)
    backward(model, 0)
    grads = [p.grad for p in biases]
    optimizer.step()
    assert updater.updated
    assert all(p.grad is g for p, g in zip(biases, grads, strict=True))  # given back after the step
    assert all(p.grad is not None for p in weights)


def test_activation_checkpointing_and_evaluation_in_between() -> None:
    found = []
    for wrapped in (False, True):
        model = tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        updater = rigl.RigL(model, optimizer, t_end=20, delta_t=2)
        for seed in range(8):
            optimizer.zero_grad()
            x, y = batch(seed)
            if wrapped:
                with torch.no_grad():
                    model(x)
                model(x)  # with a graph, but no backward
                out = checkpoint(model, x, use_reentrant=False)
            else:
                out = model(x)
            F.cross_entropy(out, y).backward()
            optimizer.step()
        assert updater.updates == 3
        found.append(masks(model))
    assert all(map(torch.equal, *found))


def test_bfloat16_autocast() -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = rigl.RigL(model, optimizer, t_end=20, delta_t=2)
    for seed in range(6):
        x, y = batch(seed)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert updater.updates == 2
    model[0].topology.validate()
