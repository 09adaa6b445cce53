"""Which weights to drop and which to grow: pure functions, exact counts, ties by position.

Nothing here draws on `torch.topk`, whose choice among equal scores is not defined.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_kernels.positions import draw_positions


def magnitudes(values: Tensor, block_score: str = "l1") -> Tensor:
    """Score of every active position: |w|, or the norm of its block. `[nnz]` or `[n, b, b]` -> `[n]`."""
    values = values.detach()
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    if values.dim() == 1:
        return values.abs()
    blocks = values.flatten(1)
    return blocks.abs().sum(1) if block_score == "l1" else blocks.square().sum(1).sqrt()


def smallest(scores: Tensor, k: int) -> Tensor:
    """Indices of the k smallest scores, ascending: the first k in the order (score, index).

    Args:
        scores: `[n]` finite.
        k: clipped to `[0, n]`.
    """
    n = scores.numel()
    if k <= 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    if k >= n:
        return torch.arange(n, device=scores.device)
    threshold = scores.kthvalue(k).values
    chosen = scores < threshold
    missing = k - int(chosen.sum())
    chosen[(scores == threshold).nonzero().flatten()[:missing]] = True
    return chosen.nonzero().flatten()


def largest(scores: Tensor, positions: Tensor, k: int) -> Tensor:
    """The k positions that come first in the order (score descending, position ascending), as a set.

    Args:
        scores: `[m]` finite.
        positions: `[m]` int64, distinct, any order.
        k: clipped to `[0, m]`.
    """
    m = scores.numel()
    if k <= 0 or k >= m:
        return positions[: max(k, 0)]
    threshold = scores.kthvalue(m - k + 1).values
    above = positions[scores > threshold]
    tied = positions[scores == threshold].sort().values
    return torch.cat([above, tied[: k - above.numel()]])


def random_outside(kept: Tensor, total: int, k: int, generator: torch.Generator) -> Tensor:
    """Draw k distinct positions of `range(total)` that are not in `kept`, uniformly at random, ascending.

    Memory O(len(kept) + k): ranks among the free positions are drawn, then shifted past the kept ones.

    Args:
        kept: `[n]` int64, ascending.
        total: number of positions.
        k: at most `total - n`.
        generator: a CPU generator.
    """
    ranks = draw_positions(total - kept.numel(), k, generator).to(kept.device)
    free_before = kept - torch.arange(kept.numel(), device=kept.device)
    return ranks + torch.searchsorted(free_before, ranks, right=True)


def rewire(drop: Tensor, dropped: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
    """Cancel what is both dropped and grown: such a weight simply stays, with its value and state.

    Args:
        drop: `[k]` indices into the value order, ascending.
        dropped: `[k]` the positions of those, ascending.
        grown: `[k]` the positions chosen to grow, any order.

    Returns:
        The indices to drop and the positions to grow that are left, equally many.
    """
    if drop.numel() == 0:
        return drop, grown
    place = torch.searchsorted(dropped, grown).clamp_(max=drop.numel() - 1)
    again = dropped[place] == grown
    leaves = torch.ones_like(drop, dtype=torch.bool)
    leaves[place[again]] = False
    return drop[leaves], grown[~again]
