"""Growth without a dense gradient: the best inactive positions of a layer, found tile by tile.

On a topology batch the layer's backward shows its input and output gradient to a `GrowthScorer`. That
computes the dense weight gradient one stripe of rows at a time with the dense library, turns it into
scores (|g|, or the norm of each block of g), and keeps only the scores of the active positions and the
k best of the inactive ones: memory O(nnz + k + stripe). The result equals top-k over the whole dense
gradient, ties going to the lowest position.
"""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Iterator
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


class GradientSum:
    """A dense weight gradient, as the pairs (input, output gradient) that it is the sum of.

    Summed up into a tensor only when they would take more memory than that.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._pairs: list[tuple[Any, ...]] = []
        self._total: Tensor | None = None

    def __bool__(self) -> bool:
        return bool(self._pairs) or self._total is not None

    @property
    def bytes_held(self) -> int:
        """Memory of what it holds on to."""
        held = [t for pair in self._pairs for t in pair if isinstance(t, Tensor)]
        held += [] if self._total is None else [self._total]
        return sum(t.numel() * t.element_size() for t in held)

    def add(self, x: Tensor, dy: Tensor, *conf: Any) -> None:
        """One pair: `x [tokens, in]`, `dy [tokens, out]` of a Linear; images and settings of a Conv2d."""
        self._pairs.append((x.detach(), dy.detach(), *conf))
        if len(self._pairs) > 1 or self._total is not None:  # a single one is alive anyway
            self._fold()

    def merge(self, other: GradientSum) -> None:
        """Add another one, which is not to be used any more."""
        self._pairs += other._pairs
        if other._total is not None:
            self._total = other._total if self._total is None else self._total.add_(other._total)
        if self:
            self._fold()

    @torch.no_grad()
    def _fold(self) -> None:
        topology = self._topology
        like = self._total if self._total is not None else _wide(self._pairs[0][0][:0])
        if self._total is None and self.bytes_held <= math.prod(topology.shape) * like.element_size():
            return
        if self._total is None:
            self._total = like.new_zeros(topology.shape)
        b_out = topology.block_size[0]
        for begin, part in self._stripes_of_pairs():
            self._total[begin * b_out : begin * b_out + part.shape[0]] += part
        self._pairs.clear()

    def _stripes_of_pairs(self) -> Iterator[tuple[int, Tensor]]:
        topology = self._topology
        stripe_of: Any = dense.linear_stripe if len(topology.shape) == 2 else dense.conv2d_stripe
        pairs = [(_wide(x), _wide(dy), *conf) for x, dy, *conf in self._pairs]
        for begin, end in dense.stripes(topology) if pairs else ():
            with dense.no_autocast(pairs[0][0].device.type):
                parts = (stripe_of(x, dy, topology, begin, end, *conf) for x, dy, *conf in pairs)
                yield begin, functools.reduce(Tensor.add_, parts)

    def stripes(self) -> Iterator[tuple[int, Tensor]]:
        """Its rows, stripe by stripe: the first block row, and a tensor that may be written to."""
        if self._total is None:
            yield from self._stripes_of_pairs()
            return
        b_out = self._topology.block_size[0]
        for begin, end in dense.stripes(self._topology):
            yield begin, self._total[begin * b_out : end * b_out].clone()


def _wide(t: Tensor) -> Tensor:
    """In a dtype to sum in: float32 for the reduced ones."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


_scorers: weakref.WeakValueDictionary[int, GrowthScorer] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


class GrowthScorer:
    """Scores all positions of one layer on the gradient of its batch.

    Args:
        topology: the layer's topology. Must not change before `result`.
        k: how many inactive positions to keep.
        block_score: `"l1"` (sum of |g| over a block) or `"l2"`; the same for single weights.
        defer: score the *summed* gradient of several backward passes in `result` (gradient
            accumulation). Otherwise one pass is scored at once and let go.

    Attributes:
        ticket: what the layer's backward names the scorer by (see `_observe`).
        observed: backward passes taken.
        refusal: why scores would be wrong; empty if they would not.
    """

    def __init__(self, topology: Topology, k: int, block_score: str = "l1", defer: bool = False) -> None:
        if block_score not in BLOCK_SCORES:
            raise ValueError(f'block_score must be "l1" or "l2", got {block_score!r}')
        if k < 0:
            raise ValueError(f"k must not be negative, got {k}")
        self.topology, self.block_score, self.defer = topology, block_score, defer
        self.k = min(k, topology.rows * topology.cols - topology.n_blocks)
        number = next(_numbers)
        _scorers[number] = self
        self.ticket = torch.tensor([number], device="cpu")
        self.reset()

    def reset(self) -> None:
        """Forget what was shown (the gradients it belongs to were zeroed)."""
        self.observed, self.refusal = 0, ""
        self._growth: Growth | None = None
        self._gradient = GradientSum(self.topology)

    def refuse(self, reason: str) -> None:
        """Note that what was shown is not the gradient."""
        self.refusal = reason

    def observe(self, x: Tensor, dy: Tensor, *conf: Any) -> None:
        """Take a backward pass of one pair; see `GradientSum.add`."""
        gradient = GradientSum(self.topology)
        gradient.add(x, dy, *conf)
        self.take(gradient)

    def take(self, gradient: GradientSum) -> None:
        """Take a backward pass."""
        self.observed += 1
        if self.defer:
            self._gradient.merge(gradient)
        elif self.observed == 1:
            self._growth = self._score(gradient)

    def result(self) -> Growth:
        """The scores and candidates.

        Raises:
            RuntimeError: nothing was shown, more than one pass without `defer`, or what is not the gradient.
        """
        if self.refusal:
            raise RuntimeError(self.refusal)
        if self.observed == 0:
            raise RuntimeError("no backward pass has been seen")
        if self.defer:
            return self._score(self._gradient)
        if self.observed > 1 or self._growth is None:
            raise RuntimeError(f"{self.observed} backward passes were seen where one was expected")
        return self._growth

    @torch.no_grad()
    def _score(self, gradient: GradientSum) -> Growth:
        topology, found = self.topology, 0
        index, device = topology.index.cpu(), topology.device
        active = best_scores = torch.empty(0, device="cpu")
        best_positions = torch.empty(2 * self.k + 1024, dtype=torch.int64, device="cpu")
        for begin, rows in gradient.stripes():
            blocks = dense.stripe_to_blocks(rows, topology).flatten(2)
            if topology.block_numel == 1:
                scores = blocks.squeeze(-1).abs_()
            elif self.block_score == "l1":
                scores = blocks.abs().sum(-1)
            else:
                scores = blocks.square().sum(-1).sqrt()
            if begin == 0:
                device = scores.device
                active = scores.new_zeros(topology.n_blocks, device="cpu")
                best_scores = scores.new_empty(2 * self.k + 1024, device="cpu")
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


@torch.library.impl("sparse_kernels::observe", "default")
def _observe(ticket: Tensor, x: Tensor, dy: Tensor, conf: list[int], exact: bool) -> None:
    """What a layer's backward calls: shows a pair to the scorer of the ticket, if that is still there.

    An operator, so that the compiler takes it as one. The ticket says it is written to, so that the call
    counts as having an effect.
    """
    scorer = _scorers.get(int(ticket))
    if scorer is None:
        return
    if not exact:
        scorer.refuse('derivatives of gradients are scored by backend "cpu" only')
    settings = (tuple(conf[:2]), tuple(conf[2:4]), tuple(conf[4:6]), conf[6]) if conf else ()
    scorer.observe(x, dy, *settings)
