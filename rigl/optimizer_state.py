"""Optimizer state that follows the weights, and updates that happen wholly or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_kernels import reorder_
from sparse_kernels.nn import SparseLayer


@dataclass(frozen=True, slots=True)
class Plan:
    """The update of one layer, decided but not made.

    Attributes:
        name: the layer's name.
        layer: the layer.
        drop: `[k]` int64 indices into the value order.
        grow: `[k]` int64 positions.
    """

    name: str
    layer: SparseLayer
    drop: Tensor
    grow: Tensor


def state_tensors(optimizer: torch.optim.Optimizer, name: str, layer: SparseLayer) -> list[Tensor]:
    """The tensors of the optimizer's state that have one entry per value of the layer.

    These are the ones of the values' shape (momentum, moments), and for blocks those with factored
    inner dimensions (`[n_blocks, b, 1]`). Scalars, such as Adam's step, belong to no single weight.

    Raises:
        RuntimeError: state of another shape, which cannot follow a topology.
    """
    values = layer.values
    found = []
    for key, state in optimizer.state.get(values, {}).items():
        if not isinstance(state, Tensor) or state.dim() == 0:
            continue
        if state.shape == values.shape or (
            values.dim() == 3 and state.dim() == 3 and state.shape[0] == values.shape[0]
        ):
            found.append(state)
        elif state.numel() > 1:
            raise RuntimeError(
                f"{type(optimizer).__name__} keeps state {key!r} of shape {tuple(state.shape)} for values "
                f"{tuple(values.shape)} of layer {name!r}: it cannot follow a change of topology. Use an "
                "optimizer whose state has the parameter's shape (SGD, Adam, AdamW, RMSprop, ...)"
            )
    return found


def apply_plans(plans: Sequence[Plan], optimizer: torch.optim.Optimizer) -> None:
    """Update all layers, their values, gradients and optimizer state; on any error put all of it back.

    New positions get value 0, gradient 0 and state 0. All tensors keep their memory.
    """
    followers = [state_tensors(optimizer, plan.name, plan.layer) for plan in plans]
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        for plan, state in zip(plans, followers, strict=True):
            if plan.drop.numel() == 0:
                continue
            values = plan.layer.values
            grads = [] if values.grad is None else [values.grad]
            touched = [plan.layer.topology.index, values.data, *grads, *state]
            saved += [(tensor, tensor.clone()) for tensor in touched]
            source = plan.layer.update_topology(plan.drop, plan.grow)
            for tensor in state:
                reorder_(tensor, source)
    except BaseException:  # also an interrupt: the state is the old one or the new one, nothing between
        with torch.no_grad():
            for tensor, old in saved:
                tensor.copy_(old)
        raise
