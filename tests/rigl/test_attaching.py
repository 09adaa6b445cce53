"""One method on one optimizer and its layers: attaching, detaching, wrappers, and being let go."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_loops import backward, masks, tiny

import rigl

METHODS = [rigl.RigL, rigl.SET, rigl.Static]


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for seed in range(steps):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()


def test_a_constructor_that_fails_attaches_nothing() -> None:
    model = tiny()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match=r"fraction in \[0, 1\], got 1.2"):
        rigl.RigL(model, optimizer, t_end=10, schedule=lambda t: 1.2)
    assert model[0].growth is None
    updater = rigl.RigL(model, optimizer, t_end=10)
    train(model, optimizer, 2)
    assert updater.updates == 1


def test_detaching_twice_leaves_the_next_one_alone() -> None:
    model = tiny()
    optimizer = sgd(model)
    first = rigl.RigL(model, optimizer, t_end=10)
    first.remove()
    second = rigl.RigL(model, optimizer, t_end=10)
    first.remove()
    train(model, optimizer, 1)
    assert second.updates == 1
    with pytest.raises(ValueError, match="RigL is attached to this optimizer already"):
        rigl.SET(model, optimizer, t_end=10)


def test_a_layer_belongs_to_one_method() -> None:
    """Two optimizers over the same weights: the update of one would leave the other's momentum behind."""
    model = tiny()
    first = rigl.RigL(model, sgd(model), t_end=10)
    other = sgd(model)
    with pytest.raises(ValueError, match=r"RigL is attached to layer '0' already; call its .remove\(\)"):
        rigl.SET(model, other, t_end=10)
    first.remove()
    rigl.SET(model, other, t_end=10)


@pytest.mark.parametrize("method", METHODS)
def test_what_nobody_holds_is_freed(method: Callable[..., Any]) -> None:
    def forgotten() -> list[weakref.ref[Any]]:
        model = tiny()
        optimizer = sgd(model)
        updater = method(model, optimizer, t_end=10)
        train(model, optimizer, 3)
        return [weakref.ref(part) for part in (model[0], optimizer, updater)]

    alive = forgotten()
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


@pytest.mark.parametrize("method", METHODS)
def test_a_new_optimizer_for_the_same_model(method: Callable[..., Any]) -> None:
    """A second phase of training: the first optimizer, and the method with it, is simply dropped."""
    model = tiny()
    for _ in range(2):
        optimizer = sgd(model)
        updater = method(model, optimizer, t_end=10, delta_t=2)
        train(model, optimizer, 4)
        assert updater.updates == {"RigL": 2, "SET": 2, "Static": 0}[method.__name__]
        del optimizer, updater


class Wrapper(torch.optim.Optimizer):
    """As Accelerate's: an Optimizer without hooks of its own, which steps when it sees fit."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.calls = 0

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.calls % 2 == 0:
            self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        if self.calls % 2 == 0:
            self.optimizer.step()


def test_a_wrapped_optimizer_is_unwrapped() -> None:
    model = tiny()
    optimizer = Wrapper(sgd(model))
    updater = rigl.RigL(model, optimizer, t_end=100, delta_t=2)
    train(model, optimizer, 12)  # two passes to a step
    assert (updater.updates, updater.step_count) == (2, 4)


def test_names_are_those_of_the_model_compiled_or_not() -> None:
    """SET draws by name, and states are looked up by it."""
    found, states = [], []
    for compiled in (False, True):
        model = tiny()
        optimizer = sgd(model)
        outer = torch.compile(model, backend="eager") if compiled else model
        updater = rigl.SET(outer, optimizer, t_end=10, delta_t=1)
        train(model, optimizer, 3)
        found.append(masks(model))
        states.append(updater.state_dict())
        updater.load_state_dict(states[0])
    assert all(map(torch.equal, *found))
    assert states[0] == states[1]
