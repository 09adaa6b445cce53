"""Growth without a dense gradient: the best inactive positions of a layer, found tile by tile.

On a topology batch the layer's backward shows its input and output gradient to a `GrowthScorer`. That
computes the dense weight gradient one stripe of rows at a time with the dense library, turns it into
scores (|g|, or the norm of each block of g), and keeps only the scores of the active positions and the
k best of the inactive ones: memory O(nnz + k + stripe). The result equals top-k over the whole dense
gradient, ties going to the lowest position.

On a GPU nothing is read on the host. For blocks all scores are kept there, one number a block.
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
from .backend import has_triton
from .topology import Topology

BLOCK_SCORES = ("l1", "l2")


@dataclass(frozen=True)
class Growth:
    """What a scorer found.

    Attributes:
        active: `[n_blocks]` scores of the active positions, in value order; -inf for some of which no more is
            known than that k inactive positions are better.
        positions: `[<= k]` int64, the best inactive positions, ascending; ties went to the lowest.
        scores: `[<= k]` their scores.
        finite: False if any score of the layer is NaN or infinite; the rest is then meaningless.
    """

    active: Tensor
    positions: Tensor
    scores: Tensor
    finite: bool


@dataclass(frozen=True)
class DeviceGrowth:
    """What a scorer found on a GPU: what `rewiring.plan_rewiring` takes.

    Attributes:
        active: `[n]` scores of the active single weights, in value order. None for blocks.
        positions: `[k]` int64 for single weights: the best inactive positions, best first, ties to the
            lowest. None for blocks.
        scores: `[k]` their scores; for blocks those of all positions, `[rows * cols]`.
        finite: 0-d bool: False if any score of the layer is NaN or infinite; the rest is then meaningless.
    """

    active: Tensor | None
    positions: Tensor | None
    scores: Tensor
    finite: Tensor


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

    @property
    def tokens(self) -> tuple[Tensor, Tensor] | None:
        """All pairs of a Linear as one; None if they are not kept, or of several dtypes."""
        pairs = self._pairs
        if self._total is not None or not pairs or len(self._topology.shape) != 2:
            return None
        if len({t.dtype for pair in pairs for t in pair}) > 1:
            return None
        x, dy = zip(*pairs, strict=True)
        return (x[0], dy[0]) if len(pairs) == 1 else (torch.cat(x), torch.cat(dy))

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
        if pairs and len(topology.shape) == 2 and not topology._gpu:
            yield from _linear_stripes(pairs, topology)
            return
        for begin, end in dense.stripes(topology, pairs[0][0].device.type) if pairs else ():
            with dense.no_autocast(pairs[0][0].device.type):
                parts = (stripe_of(x, dy, topology, begin, end, *conf) for x, dy, *conf in pairs)
                yield begin, functools.reduce(Tensor.add_, parts)

    def stripes(self) -> Iterator[tuple[int, Tensor]]:
        """Its rows, stripe by stripe: the first block row, and a tensor that may be written to."""
        if self._total is None:
            yield from self._stripes_of_pairs()
            return
        b_out = self._topology.block_size[0]
        for begin, end in dense.stripes(self._topology, self._total.device.type):
            yield begin, self._total[begin * b_out : end * b_out].clone()


def _linear_stripes(pairs: Any, topology: Topology) -> Iterator[tuple[int, Tensor]]:
    """The dense gradient of a Linear on the CPU, all in the same memory, which stays in the cache.

    The dense library is slower on less than 256 rows.
    """
    b_out = topology.block_size[0]
    outputs, inputs = topology.shape
    rows = max(1, min(dense._STRIPE_ELEMENTS["cpu"], max(256 * inputs, 1 << 18)) // max(1, inputs) // b_out)
    stripe = pairs[0][0].new_empty(rows * b_out, inputs)
    with dense.no_autocast("cpu"):
        for begin in range(0, topology.rows, rows):
            part = stripe[: outputs - begin * b_out]
            for i, (x, dy) in enumerate(pairs):
                factor = dy[:, begin * b_out : begin * b_out + part.shape[0]].t()
                torch.addmm(part, factor, x, beta=min(i, 1), out=part)
            yield begin, part


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
        self._growth: Growth | DeviceGrowth | None = None
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

    def result(self) -> Growth | DeviceGrowth:
        """The scores and candidates; a DeviceGrowth if the topology has the layout of a GPU.

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

    def _score(self, gradient: GradientSum) -> Growth | DeviceGrowth:
        with torch.no_grad():
            if not self.topology._gpu:
                return self._score_on_host(gradient)
            if not self.topology.is_bsr:
                return best_weights(gradient, self.topology, self.k)
            scores = score_matrix(gradient, self.topology, self.block_score).flatten()
            return DeviceGrowth(None, None, scores, scores.isfinite().all())

    def _worth_screening(self, x: Tensor, dy: Tensor) -> bool:
        """Whether bounds of all scores and exact ones of a few cost less than exact ones of all. Measured."""
        topology = self.topology
        total = topology.rows * topology.cols
        return (
            topology.block_numel == 1
            and x.dtype == dy.dtype == torch.float32
            and total >= 1 << 16
            and 50 * self.k <= total
        )

    def _score_on_host(self, gradient: GradientSum) -> Growth:
        topology, k = self.topology, self.k
        index, n, *grid = topology._on_cpu()
        if (tokens := gradient.tokens) is not None and self._worth_screening(*tokens):
            x, dy = (t.contiguous() for t in tokens)
            active, positions, scores = _ops.growth_screen(x, dy, index, n, *grid, k)
            if active.numel() > 0:
                return Growth(active, positions, scores, finite=True)
        active = best_scores = torch.zeros(n, device="cpu")[:0]
        positions = torch.empty(0, dtype=torch.int64, device="cpu")
        state, device, finite = None, topology.device, True
        for begin, rows in gradient.stripes():
            scores = rows if topology.block_numel == 1 else _norms(rows, topology, self.block_score)
            scores = scores.reshape(rows.shape[0] // topology.block_size[0], topology.cols).cpu()
            if state is None:
                device, active = rows.device, scores.new_zeros(n)
                state = _ops.growth_state(scores, k)
            finite = _ops.growth_scan(scores, begin, index, n, *grid, active, state, k)
            if not finite:
                break
        if state is not None and finite:
            positions, best_scores = _ops.growth_best(active, state, topology.rows, topology.cols, k)
        return Growth(active.to(device), positions.to(device), best_scores.to(device), finite)


def _norms(rows: Tensor, topology: Topology, block_score: str) -> Tensor:
    """Scores of a stripe of the dense gradient, which is written to: `[block rows, cols]`."""
    blocks = dense.stripe_to_blocks(rows, topology).flatten(2)
    if topology.block_numel == 1:
        return blocks.squeeze(-1).abs_()
    return blocks.abs().sum(-1) if block_score == "l1" else blocks.square().sum(-1).sqrt()


def score_matrix(gradient: GradientSum, topology: Topology, block_score: str) -> Tensor:
    """Norms of all blocks of the dense gradient, `[rows, cols]`, float32 or float64.

    On a GPU this is all the arithmetic of a topology batch that is not sparse. Its operator for Linear may be
    one kernel, which takes norms while it multiplies.
    """
    if (tokens := gradient.tokens) is not None:
        return _ops.growth_norms(*tokens, *topology.block_size, block_score)  # type: ignore[no-any-return]
    parts = [_norms(rows, topology, block_score) for _, rows in gradient.stripes()]
    return torch.cat(parts) if parts else torch.zeros(topology.rows, topology.cols, device=topology.device)


def best_weights(gradient: GradientSum, topology: Topology, k: int) -> DeviceGrowth:
    """Scores of the active single weights and the k best inactive ones, without a read on the host.

    The same for single weights as `score_matrix` for blocks, which are few enough to keep them all.
    """
    tokens = gradient.tokens
    if tokens is not None and k > 0 and _by_kernel(*tokens):
        return _best_of_list(*tokens, topology, k)
    n, device = topology.n_blocks, topology.device
    flat, row_ptr = topology.positions(), topology.row_ptr.long()
    active = best = torch.zeros(0, device=device)
    positions = torch.zeros(0, dtype=torch.int64, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    for begin, rows in gradient.stripes():
        size, first = rows.numel(), begin * topology.cols
        if begin == 0:
            active, best = rows.new_zeros(n + 1), rows.new_zeros(0)
        score = torch.cat([_norms(rows, topology, "l1").flatten(), rows.new_zeros(1)])
        finite &= score.isfinite().all()
        # Active positions of the stripe: their number is known on the device only, its bound here. The rest
        # of this many go to a place of their own, behind the others.
        entry = torch.arange(min(n, size), device=device) + row_ptr[begin]
        live = entry < row_ptr[begin + rows.shape[0]]
        place = torch.where(live, flat[entry.clamp(max=max(n - 1, 0))] - first, size) if n else entry
        active.scatter_(0, torch.where(live, entry, n), score[place])
        score.scatter_(0, place, -torch.inf)
        score[size].fill_(-torch.inf)  # a number that is assigned would be copied from the host
        found = _first_largest(score[:size], min(k, size))
        # Candidates so far come first, in order and at lower positions: a stable sort leaves ties right.
        best, order = torch.cat([best, score[found]]).sort(descending=True, stable=True)
        best, order = best[:k], order[:k]
        positions = torch.cat([positions, found + first])[order]
    return DeviceGrowth(active[:n], positions, best, finite)


def _by_kernel(x: Tensor, dy: Tensor) -> bool:
    """Whether a Triton kernel can take candidates while it multiplies."""
    if not has_triton(x.device.type):
        return False
    from .triton import growth

    return growth.takes(x, dy)


def _best_of_list(x: Tensor, dy: Tensor, topology: Topology, k: int) -> DeviceGrowth:
    """`best_weights` from the list of candidates that a kernel makes.

    Active positions that are not in the list have no chance against k that are: their score is -inf.
    """
    from .triton import growth, operators

    n, active = topology.n_blocks, topology.positions()
    if topology.growth_guess is None or topology.growth_guess.device != x.device:
        topology.growth_guess = torch.full((), torch.inf, device=x.device)
    positions, scores, finite = operators.growth_candidates(x, dy, active, k, topology.growth_guess)
    positions, order = positions.long().sort()
    scores = scores[order]
    taken = growth.contains(active, positions)
    place = torch.where(taken, torch.searchsorted(active, positions), n)
    of_active = scores.new_full((n + 1,), -torch.inf).scatter_(0, place, scores)[:n]
    best, order = scores.masked_fill(taken, -torch.inf).sort(descending=True, stable=True)
    cut = 0.7 * best[k - 1]  # the next update's will not be far from it
    topology.growth_guess.copy_(torch.where(cut > 0, cut, torch.inf))
    return DeviceGrowth(of_active, positions[order[:k]], best[:k], finite)


def _first_largest(score: Tensor, k: int) -> Tensor:
    """Indices of the k largest, ascending; of equal ones the lowest, where `topk` would choose any."""
    if k == 0:
        return torch.zeros(0, dtype=torch.int64, device=score.device)
    threshold = score.topk(k, sorted=False).values.amin()
    better, tied = score > threshold, score == threshold
    chosen = better | (tied & (tied.cumsum(0) <= k - better.sum()))
    wanted = torch.arange(1, k + 1, device=score.device)
    return torch.searchsorted(chosen.cumsum(0), wanted).clamp_(max=score.numel() - 1)


def _observe(ticket: Tensor, x: Tensor, dy: Tensor, conf: list[int], exact: bool) -> None:
    """What a layer's backward calls: shows a pair to the scorer of the ticket, if that is still there.

    An operator, so that the compiler takes it as one. The ticket says it is written to, so that the call
    counts as having an effect.
    """
    scorer = _scorers.get(int(ticket))
    if scorer is None:
        return
    if not exact:
        scorer.refuse('backend "reference" does not show derivatives of gradients')
    compiled = not _in_own_backward()
    if compiled or (scorer.defer and x.grad_fn is None):  # a leaf may be refilled with the next batch
        x = x.clone()
    if compiled or scorer.defer:
        dy = dy.clone()
    settings = (tuple(conf[:2]), tuple(conf[2:4]), tuple(conf[4:6]), conf[6]) if conf else ()
    scorer.observe(x, dy, *settings)


def _in_own_backward() -> bool:
    """Whether a Function of this package is what calls.

    Compiled code is the other possibility. It uses memory for something else once the last operator that
    reads it has run, before the gradient has arrived and is scored.
    """
    function = getattr(torch._C._current_autograd_node(), "_forward_cls", None)
    return function is not None and function.__module__.partition(".")[0] == __package__


torch.library.impl("sparse_kernels::observe", "default", _observe)
