"""The oracle: every product in plain torch, on the dense weight. The slow version that is the truth.

Imports torch only. Gradients are those of torch's autograd through the scatter of the values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from .topology import Topology


def linear(x: Tensor, values: Tensor, topology: Topology, bias: Tensor | None = None) -> Tensor:
    """`x @ dense(values).T + bias`."""
    return F.linear(x, topology.to_dense(values), bias)


def conv2d(
    x: Tensor,
    values: Tensor,
    topology: Topology,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d` with the dense weight."""
    return F.conv2d(x, topology.to_dense(values), bias, stride, padding, dilation, groups)


def growth_scores(gradient: Tensor, topology: Topology, block_score: str = "l1") -> Tensor:
    """Scores of all positions, `[rows * cols]`, from the dense gradient: |g|, or a norm of each block."""
    blocks = topology.to_blocks(gradient).flatten(2)
    scores = blocks.abs().sum(-1) if block_score == "l1" else blocks.square().sum(-1).sqrt()
    return scores.flatten()


def top_inactive(scores: Tensor, topology: Topology, k: int) -> Tensor:
    """The k inactive positions with the largest scores, best first, ties to the lowest position."""
    active = torch.zeros_like(scores, dtype=torch.bool)
    active[topology.positions()] = True
    inactive = (~active).nonzero().flatten()
    order = scores[inactive].sort(descending=True, stable=True).indices
    return inactive[order[:k]]
