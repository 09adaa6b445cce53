"""Optimizer state that follows the weights, and updates that happen wholly or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_kernels.nn import SparseLayer
from sparse_kernels.rewiring import reordered


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


class HostUpdate:
    """The update of all layers on the host, ready to be made.

    All that can fail is behind it when it is there, and nothing has changed: what becomes of the indices,
    values, gradients and optimizer state stands beside them. New positions get 0 in all of these.

    Args:
        plans: of the layers.
        optimizer: of their values.

    Attributes:
        replaced: weights.
        layers: how many.
    """

    def __init__(self, plans: Sequence[Plan], optimizer: torch.optim.Optimizer) -> None:
        self.replaced, self.layers = 0, len(plans)
        self._writes: list[tuple[Tensor, Tensor]] = []
        for plan in plans:
            values, topology = plan.layer.values, plan.layer.topology
            state = state_tensors(optimizer, plan.name, plan.layer)
            if plan.drop.numel() == 0:
                continue
            index, source = topology.updated(plan.drop, plan.grow)
            grads = [] if values.grad is None else [values.grad]
            self._writes += [(t, reordered(t, source)) for t in (values.data, *grads, *state)]
            self._writes.append((topology.index, index))
            self.replaced += plan.drop.numel() * topology.block_numel

    def apply(self) -> None:
        """Make it. All tensors keep their memory.

        Copies may be repeated: an interrupt between two of them does not leave the update half made.
        """
        try:
            self._copy()
        except BaseException:
            self._copy()
            raise

    @torch.no_grad()
    def _copy(self) -> None:
        for tensor, new in self._writes:
            tensor.copy_(new)
