"""Which weights to drop and which to grow: pure functions, exact counts, ties by position.

Nothing here draws on `torch.topk`, whose choice among equal scores is not defined.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_kernels import _ops
from sparse_kernels.growth import Growth
from sparse_kernels.positions import draw_positions
from sparse_kernels.topology import Topology


def finite(tensor: Tensor) -> bool:
    """Whether all entries are finite. Waits for a GPU."""
    tensor = tensor.detach()
    if tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64):
        return bool(_ops.all_finite(tensor.contiguous()))
    return bool(tensor.isfinite().all())


def magnitudes(values: Tensor, block_score: str = "l1") -> Tensor:
    """Score of every active position: |w|, or the norm of its block. `[nnz]` or `[n, b, b]` -> `[n]`."""
    return signed(values, block_score).abs()


def signed(values: Tensor, block_score: str = "l1") -> Tensor:
    """The same, but single weights keep their sign: what `weakest` takes, without a copy."""
    values = values.detach()
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    if values.dim() == 1:
        return values
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


def weakest(topology: Topology, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k positions whose scores are nearest to 0: where their values stand, and they, ascending.

    Equal ones go by position, wherever their values stand.

    Args:
        topology: of the values.
        scores: `[n_blocks]` finite, in value order: magnitudes, or single weights with their sign.
        k: clipped to `[0, n_blocks]`.
    """
    if topology.device.type == "cpu":
        return _ops.weakest(scores.contiguous(), *topology._on_cpu(), k)  # type: ignore[no-any-return]
    positions = topology.positions()
    if topology.slot is None:
        drop = smallest(scores.abs(), k)
    else:
        order = positions.argsort()
        drop = order[smallest(scores[order].abs(), k)]
    return drop, positions[drop]


def exchange(drop: Tensor, dropped: Tensor, growth: Growth) -> tuple[Tensor, Tensor]:
    """Of the weights dropped and the candidates to grow, the best by growth score stay or come.

    Equal ones go by position, the lowest first.

    Args:
        drop: `[k]` where the values of those dropped stand.
        dropped: `[k]` their positions, ascending.
        growth: with at least k candidates, or all there are.

    Returns:
        What is still to drop, and the positions to grow, equally many.
    """
    found = growth.active, growth.positions, growth.scores
    return _ops.exchange(drop, dropped, *found)  # type: ignore[no-any-return]


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
