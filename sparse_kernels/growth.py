"""Growth without a dense gradient: the best inactive positions of a layer, found tile by tile.

On a topology batch the layer's backward shows its input and output gradient to a `GrowthScorer`. That
computes the dense weight gradient one stripe of rows at a time with the dense library, turns it into
scores (|g|, or the norm of each block of g), and keeps only the scores of the active positions and the
k best of the inactive ones: memory O(nnz + k + stripe). The result equals top-k over the whole dense
gradient, ties going to the lowest position.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _ops, dense
from .topology import Topology

BLOCK_SCORES = ("l1", "l2")


@dataclass(frozen=True)
class Growth:
    """What a scorer found.

    Attributes:
        active: `[n_blocks]` scores of the active positions, in value order.
        positions: `[<= k]` int64, the best inactive positions, best first, ties to the lowest.
        scores: `[<= k]` their scores.
        finite: False if any score of the layer is NaN or infinite; the rest is then meaningless.
    """

    active: Tensor
    positions: Tensor
    scores: Tensor
    finite: bool


class GrowthScorer:
    """Scores all positions of one layer on the gradient of its batch.

    Args:
        topology: the layer's topology. Must not change before `result`.
        k: how many inactive positions to keep.
        block_score: `"l1"` (sum of |g| over a block) or `"l2"`; the same for single weights.
        defer: keep the (input, output gradient) pairs shown and score their *summed* gradient in
            `result`. Needed when several backward passes make up one step (gradient accumulation, a
            layer used more than once). Otherwise a pair is scored at once and let go.
    """

    def __init__(self, topology: Topology, k: int, block_score: str = "l1", defer: bool = False) -> None:
        if block_score not in BLOCK_SCORES:
            raise ValueError(f'block_score must be "l1" or "l2", got {block_score!r}')
        if k < 0:
            raise ValueError(f"k must not be negative, got {k}")
        self.topology, self.block_score, self.defer = topology, block_score, defer
        self.k = min(k, topology.rows * topology.cols - topology.n_blocks)
        self.observed = 0
        self._pairs: list[tuple[Any, ...]] = []
        self._growth: Growth | None = None

    def reset(self) -> None:
        """Forget what was shown (the gradients it belongs to were zeroed)."""
        self.observed, self._growth = 0, None
        self._pairs.clear()

    def observe(self, x: Tensor, dy: Tensor, *conf: Any) -> None:
        """Take one pair: `x [tokens, in]`, `dy [tokens, out]` of a Linear; images and settings of Conv2d."""
        self.observed += 1
        pair = (x.detach(), dy.detach(), *conf)
        if self.defer:
            self._pairs.append(pair)
        elif self.observed == 1:
            self._growth = self._score([pair])

    def result(self) -> Growth:
        """The scores and candidates.

        Raises:
            RuntimeError: nothing was shown, or more than one pair without `defer`.
        """
        if self.observed == 0:
            raise RuntimeError("no backward pass has been seen")
        if self.defer:
            return self._score(self._pairs)
        if self.observed > 1 or self._growth is None:
            raise RuntimeError(f"{self.observed} backward passes were seen where one was expected")
        return self._growth

    @torch.no_grad()
    def _score(self, pairs: list[tuple[Any, ...]]) -> Growth:
        topology = self.topology
        stripe_of: Any = dense.linear_stripe if len(topology.shape) == 2 else dense.conv2d_stripe
        wide = [
            tuple(
                t.float() if isinstance(t, Tensor) and t.dtype not in (torch.float32, torch.float64) else t
                for t in p
            )
            for p in pairs
        ]
        dtype, device = wide[0][0].dtype, wide[0][0].device
        index = topology.index.cpu()
        active = torch.zeros(topology.n_blocks, dtype=dtype, device="cpu")
        best_scores = torch.empty(2 * self.k + 1024, dtype=dtype, device="cpu")
        best_positions = torch.empty(2 * self.k + 1024, dtype=torch.int64, device="cpu")
        found = 0
        for begin, end in dense.stripes(topology):
            parts = (stripe_of(x, dy, topology, begin, end, *conf) for x, dy, *conf in wide)
            gradient = functools.reduce(Tensor.add_, parts)
            blocks = dense.stripe_to_blocks(gradient, topology).flatten(2)
            if topology.block_numel == 1:
                scores = blocks.squeeze(-1).abs_()
            elif self.block_score == "l1":
                scores = blocks.abs().sum(-1)
            else:
                scores = blocks.square().sum(-1).sqrt()
            found = _ops.growth_scan(
                scores.cpu().contiguous(), begin, index, topology.n_blocks, topology.rows, topology.cols,
                topology.groups, topology._plans, active, best_scores, best_positions, self.k, found,
            )  # fmt: skip
            if found < 0:  # a score is not finite
                break
        finite = found >= 0
        # The scan leaves positions ascending, and equal scores stay in that order.
        best_scores, order = best_scores[: max(found, 0)].sort(descending=True, stable=True)
        return Growth(active.to(device), best_positions[order].to(device), best_scores.to(device), finite)
