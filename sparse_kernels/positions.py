"""Counting and drawing positions of a weight, and the blocks it may be cut into. Pure functions.

Imports torch only.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def active_count(total: int, density: float) -> int:
    """Number of active positions: `total - floor((1 - density) * total)`.

    The floor is guarded against float error: a product within a few roundings of an integer
    counts as that integer, so that density 0.1 of 1000 is 100 and not 101.
    """
    if not isinstance(density, Real) or not 0.0 <= density <= 1.0:
        raise ValueError(f"density must be a number in [0, 1], got {density!r}")
    density = float(density)
    zeros = (1.0 - density) * total
    nearest = round(zeros)
    if abs(zeros - nearest) <= 1e-15 * max(1.0, total):
        return total - nearest
    return total - math.floor(zeros)


def normalize_block_size(block_size: int | tuple[int, int]) -> tuple[int, int]:
    """`b` or `(b_out, b_in)` -> `(b_out, b_in)`, checked."""
    pair = tuple(block_size) if isinstance(block_size, (tuple, list)) else (block_size, block_size)
    if len(pair) != 2 or any(isinstance(b, bool) or not isinstance(b, Integral) or b < 1 for b in pair):
        raise ValueError(
            f"block_size must be a positive int or a pair (b_out, b_in) of them, got {block_size!r}"
        )
    return int(pair[0]), int(pair[1])


def fitting_blocks(extent: int) -> str:
    """The block sizes up to 128 that divide a dimension."""
    return ", ".join(str(b) for b in range(1, 129) if extent % b == 0)


def check_integers(name: str, t: Any) -> None:
    """Raise TypeError or ValueError unless `t` is an integer tensor that can be read."""
    if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64):
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {got}")
    if t.is_meta or t.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor with data, got one on {t.device} in {t.layout}")


def draw_positions(total: int, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` distinct positions of `range(total)`, uniform, sorted, without `total` memory when sparse."""
    if 2 * count >= total:
        return torch.randperm(total, generator=generator, device="cpu")[:count].sort().values
    found = torch.empty(0, dtype=torch.int64, device="cpu")
    while found.numel() < count:
        missing = count - found.numel()
        fresh = torch.randint(total, (missing + missing // 8 + 16,), generator=generator, device="cpu")
        found = torch.cat([found, fresh]).unique()
    if found.numel() > count:  # the set drawn is exchangeable, so any random subset of it is uniform
        found = found[torch.randperm(found.numel(), generator=generator, device="cpu")[:count]].sort().values
    return found
