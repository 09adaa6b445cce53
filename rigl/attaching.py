"""What an updater is attached to: checks of model and optimizer, and one updater at a time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sparse_kernels.nn import SparseLayer

# Who acts on an optimizer or layer; weak on both sides, so that none of them is kept alive.
_attached: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def attach(updater: Any, held: Iterable[Any]) -> None:
    """Note that an updater acts on an optimizer and layers."""
    for thing in held:
        _attached[thing] = weakref.ref(updater)


def detach(held: Iterable[Any]) -> None:
    """Forget it."""
    for thing in held:
        del _attached[thing]


def innermost(optimizer: Any) -> Any:
    """The optimizer that steps, out of wrappers such as Accelerate's: its hooks run when it really does."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def check_objects(model: nn.Module, optimizer: torch.optim.Optimizer, changes_topology: bool) -> None:
    """Raise TypeError or ValueError unless they are what an updater can act on."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if changes_topology and isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "LBFGS keeps one flat history over all parameters, which cannot follow a change of topology; "
            "use SGD, Adam, AdamW, RMSprop, ..., or rigl.Static"
        )
    _check_free(optimizer, "this optimizer")


def check_layers(layers: Mapping[str, SparseLayer], optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless there are sparse layers, held by the optimizer and by no other updater."""
    if not layers:
        raise ValueError(
            "the model has no sparse layer; make some with model = rigl.sparsify(model, sparsity=...)"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, m in layers.items() if m.values.requires_grad and id(m.values) not in held]
    if missing:
        raise ValueError(
            f"the optimizer does not hold the values of sparse layer {missing[0]!r} ({len(missing)} of "
            f"{len(layers)} layers): build the optimizer after rigl.sparsify, from model.parameters()"
        )
    for name, layer in layers.items():
        _check_free(layer, f"layer {name!r}")


def _check_free(held: Any, name: str) -> None:
    """Raise ValueError if an updater acts on an optimizer or layer already."""

    def owner() -> Any:
        return _attached[held]() if held in _attached else None

    if owner() is not None:
        gc.collect()  # one that nobody can reach any more may be waiting for this
    if (other := owner()) is not None:
        raise ValueError(f"{type(other).__name__} is attached to {name} already; call its .remove() first")


def evaluate_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Call `step`'s closure, if it has one, and hand its loss on to the optimizer's first call of it.

    The update must come after the closure's backward pass, and before the optimizer's own step.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        return args, kwargs
    with torch.enable_grad():
        losses = [closure()]

    def evaluated() -> Any:
        return losses.pop() if losses else closure()

    if "closure" in kwargs:
        return args, {**kwargs, "closure": evaluated}
    return (args[0], evaluated, *args[2:]), kwargs
