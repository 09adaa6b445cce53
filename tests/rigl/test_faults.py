"""Non-finite numbers, and errors in the middle of an update: the state is the old one or the new one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_loops import backward, batch, everything, masks, tiny
from torch import Tensor, nn
from torch.nn import functional as F

import rigl
from rigl import optimizer_state
from sparse_kernels import SparseLinear, Topology

BAD = (math.nan, math.inf, -math.inf)


def spoiled_backward(model: nn.Module, seed: int, value: float, where: str) -> None:
    """A backward pass with bad entries in the gradient of the first layer's output, or a bad loss."""
    x, y = batch(seed)
    hidden = model[0](x)
    count = {"entry": 1, "percent": hidden.numel() // 100, "all": hidden.numel(), "loss": 0}[where]

    def spoil(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad.view(-1)[torch.randperm(grad.numel())[:count]] = value
        return grad

    hidden.register_hook(spoil)
    loss = F.cross_entropy(model[2](model[1](hidden)), y)
    (loss * value if where == "loss" else loss).backward()


def test_300_injections_into_gradients() -> None:
    """NaN, +Inf, -Inf in one entry, 1 % or all of a gradient, or in the loss: none is silent (drill D17).

    On an update step nothing at all changes. On another the optimizer takes what it is given, as it
    would without us, and the update that follows finds what became of the weights.
    """
    rng = random.Random(0)
    for case in range(300):
        model = tiny(block_size=rng.choice((1, 4)), seed=case, sparsity=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        updater = rigl.RigL(model, optimizer, begin=1, t_end=20, delta_t=1, grad_accumulation=1)
        nnz = [model[0].nnz, model[2].nnz]
        on_update = case % 3 != 2
        if on_update:
            backward(model, 0)
            optimizer.step()
        before, topology = everything(model, optimizer), masks(model)
        optimizer.zero_grad()
        spoiled_backward(model, case, rng.choice(BAD), rng.choice(("entry", "percent", "all", "loss")))
        if not on_update:
            optimizer.step()
            optimizer.zero_grad()
            backward(model, 1)
        with pytest.warns(rigl.NonFiniteWarning, match=r"at step 1 skipped: .* of layer '[02]'"):
            optimizer.step()
        assert (updater.updates, updater.failed_updates, updater.step_count) == (0, 1, 1)
        assert all(map(torch.equal, topology, masks(model)))
        assert nnz == [model[0].nnz, model[2].nnz]
        if on_update:
            assert all(map(torch.equal, before, everything(model, optimizer)))


def test_a_score_that_is_bad_only_where_nothing_is_active() -> None:
    model = SparseLinear.from_dense(nn.Linear(8, 8), mask=torch.eye(8, dtype=torch.bool))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = rigl.RigL(model, optimizer, t_end=10)
    x, dy = torch.zeros(1, 8), torch.zeros(1, 8)
    x[0, 2], dy[0, 5] = 1e30, 1e30  # position (5, 2), inactive, overflows
    model(x).backward(dy)
    assert bool(model.values.grad.isfinite().all())
    with pytest.warns(rigl.NonFiniteWarning, match="growth score .* of layer ''"):
        optimizer.step()
    assert torch.equal(model.mask(), torch.eye(8, dtype=torch.bool))
    assert (updater.updates, updater.failed_updates) == (0, 1)


@pytest.mark.parametrize("method", [rigl.RigL, rigl.SET])
@pytest.mark.parametrize("value", BAD)
def test_bad_weights_stop_all_layers(method: Callable[..., rigl.RigL], value: float) -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    updater = method(model, optimizer, t_end=20, delta_t=3)
    before = masks(model)
    backward(model, 0)
    with torch.no_grad():
        model[2].values[0] = value
    with pytest.warns(rigl.NonFiniteWarning, match="a weight of layer '2' is not finite"):
        optimizer.step()
    assert all(map(torch.equal, before, masks(model)))
    assert updater.failed_updates == 1
    with torch.no_grad():
        model[2].values[0] = 0.1
    # The attempt is spent: the next comes delta_t later.
    after = []
    for seed in range(4):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()
        after.append(updater.updates)
    assert after == ([0, 0, 0, 1] if method is rigl.RigL else [0, 0, 1, 1])


def test_no_gradient_at_all() -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = rigl.RigL(model, optimizer, t_end=10)
    with pytest.warns(rigl.SkippedUpdateWarning, match="at step 0: no sparse layer has a gradient"):
        optimizer.step()
    assert updater.updates == 0
    backward(model, 0)
    optimizer.step()
    assert updater.updates == 1


def test_a_warning_made_an_error_does_not_lose_gradients() -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = rigl.RigL(model, optimizer, t_end=10, delta_t=1)
    backward(model, 0)
    model[0].values.grad[0] = math.nan
    with pytest.raises(rigl.NonFiniteWarning):  # this suite turns warnings into errors
        optimizer.step()
    assert model[0].values.grad is not None
    for seed in range(3):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()
    assert updater.updates >= 1


class Failpoints:
    """Makes the n-th pass through any of the patched functions fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at = 0, -1
        for owner, name in (
            (Topology, "updated"),
            (optimizer_state, "reordered"),
            (optimizer_state, "state_tensors"),
            (rigl.updater, "signed"),
            (rigl.updater, "finite"),
            (rigl.updater, "weakest"),
            (rigl.methods, "exchange"),
        ):
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, function: Callable) -> Callable:
        def wrapped(*args: object, **kwargs: object) -> object:
            for when in ("before", "after"):
                if when == "after":
                    result = function(*args, **kwargs)
                if self.at >= 0:
                    self.count += 1
                    if self.count - 1 == self.at:
                        self.at = -1
                        raise MemoryError(f"planted {when} {function.__name__}")
            return result

        return wrapped


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_error_anywhere_leaves_the_old_state(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place in turn where an update calls something that can fail (drill D20)."""
    model = tiny(block_size=2 if name == "sgd" else 1)
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if name == "sgd"
        else torch.optim.AdamW(model.parameters(), lr=0.01)
    )
    updater = rigl.RigL(model, optimizer, begin=1, t_end=20, delta_t=5, alpha=0.6)
    backward(model, 0)
    optimizer.step()
    before = everything(model, optimizer)
    index = [model[i].topology.index.clone() for i in (0, 2)]
    points = Failpoints(monkeypatch)
    failures = 0
    while True:
        optimizer.zero_grad()
        backward(model, 1)
        grads = [p.grad.clone() for p in model.parameters()]
        points.count, points.at = 0, failures
        try:
            optimizer.step()
        except MemoryError:
            failures += 1
        else:
            break
        assert all(map(torch.equal, before, everything(model, optimizer)))
        assert all(torch.equal(model[i].topology.index, old) for i, old in zip((0, 2), index, strict=True))
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
        assert (updater.step_count, updater.updates) == (1, 0)
    points.at = -1
    assert failures >= 20
    assert updater.updates == 1  # the attempt without a failure went through
    for i in (0, 2):
        model[i].topology.validate()


@pytest.mark.parametrize("at", range(6))
def test_an_interrupt_among_the_writes_leaves_the_new_state(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    models, states = [], []
    for interrupted in (False, True):
        torch.manual_seed(0)
        model = tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        updater = rigl.RigL(model, optimizer, begin=1, t_end=20, delta_t=5, alpha=0.6, grad_accumulation=1)
        backward(model, 0)
        optimizer.step()
        optimizer.zero_grad()
        backward(model, 1)
        if interrupted:
            copy, calls = torch.Tensor.copy_, iter(range(10**6))

            def once(
                to: torch.Tensor, other: torch.Tensor, copy: Any = copy, calls: Any = calls
            ) -> torch.Tensor:
                if next(calls) == at:
                    raise KeyboardInterrupt
                return copy(to, other)

            monkeypatch.setattr(torch.Tensor, "copy_", once)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
            monkeypatch.undo()
        else:
            optimizer.step()
        assert updater.updates == 1
        for i in (0, 2):
            model[i].topology.validate()
        models.append(model)
        states.append(everything(model, optimizer))
    assert all(map(torch.equal, *states))
    assert all(map(torch.equal, masks(models[0]), masks(models[1])))
