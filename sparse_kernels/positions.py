"""Counting, drawing and checking positions of a weight, and the blocks it may be cut into. Pure functions.

Imports torch only.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1


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


class BlockGrid(NamedTuple):
    """A weight as a grid of blocks; see topology.py."""

    shape: tuple[int, ...]
    block_size: tuple[int, int]
    rows: int
    cols: int
    taps: int  # pixels of a convolution's kernel; 1 for a Linear


def block_grid(shape: tuple[int, ...], block_size: int | tuple[int, int], groups: int) -> BlockGrid:
    """The grid of a weight `(out, in)` or `(out, in/groups, kh, kw)`.

    Raises:
        ValueError: another shape, a block that does not divide its dimension (the message names those that
            do), groups that do not divide `out`, a grid beyond int32.
    """
    shape = tuple(int(n) for n in shape)
    if len(shape) not in (2, 4) or any(n < 0 for n in shape):
        raise ValueError(f"shape must be (out, in) or (out, in/groups, kh, kw) with sizes >= 0, got {shape}")
    b_out, b_in = pair = normalize_block_size(block_size)
    if groups < 1 or shape[0] % groups:
        raise ValueError(f"groups must divide out = {shape[0]}, got {groups}")
    extents = {"out": shape[0] // groups, "in": shape[1]}
    for (name, extent), block in zip(extents.items(), pair, strict=True):
        per = " per group" if groups > 1 else ""
        if extent % block:
            common = math.gcd(*extents.values()) if b_out == b_in else extent
            raise ValueError(
                f"block size {block} does not divide the {name} dimension {extent}{per}; "
                f"sizes that fit: {fitting_blocks(common)}"
            )
    taps = shape[2] * shape[3] if len(shape) == 4 else 1
    rows, cols = shape[0] // b_out, shape[1] // b_in * taps
    if max(rows, cols * groups) >= INT32_MAX:
        raise ValueError(f"the block grid {rows} x {cols} exceeds the int32 index range (2^31 - 2 a side)")
    return BlockGrid(shape, pair, rows, cols, taps)


def check_count(count: int) -> None:
    """Raise ValueError if so many active positions exceed int32."""
    if count > INT32_MAX:
        raise ValueError(f"{count} active positions exceed the int32 index range (2^31 - 1)")


def check_integers(name: str, t: Any) -> None:
    """Raise TypeError or ValueError unless `t` is an integer tensor that can be read."""
    if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64):
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {got}")
    if t.is_meta or t.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor with data, got one on {t.device} in {t.layout}")


def draw_positions(total: int, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` distinct positions of `range(total)`, uniform, sorted, without `total` memory when sparse."""
    if generator is not None and generator.device.type != "cpu":  # positions are drawn on the CPU
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        generator = torch.Generator().manual_seed(seed)
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


def check_positions(flat: Tensor, total: int) -> None:
    """Raise ValueError unless sorted int64 positions on the CPU are distinct and in `[0, total)`."""
    if flat.numel() == 0:
        return
    low, high = int(flat[0]), int(flat[-1])
    if low < 0 or high >= total:
        raise ValueError(f"position {low if low < 0 else high} is out of range [0, {total})")
    repeated = (flat[1:] == flat[:-1]).nonzero()
    if repeated.numel():
        raise ValueError(f"position {int(flat[repeated[0, 0]])} occurs more than once")


def check_csr(row_ptr: Tensor, col_idx: Tensor, rows: int, cols: int, n: int) -> Tensor:
    """Check foreign CSR arrays of n positions of a `rows x cols` grid; return these (`[n]` int64, CPU).

    Raises:
        ValueError, TypeError: what is wrong with which of them.
    """
    for name, t, size in (("row_ptr", row_ptr, rows + 1), ("col_idx", col_idx, n)):
        check_integers(name, t)
        if tuple(t.shape) != (size,):
            raise ValueError(f"{name} must have shape ({size},), got {tuple(t.shape)}")
    ptr, col = row_ptr.detach().cpu().long(), col_idx.detach().cpu().long()
    if int(ptr[0]) != 0 or int(ptr[-1]) != n:
        raise ValueError(f"row_ptr must run from 0 to {n}, got {int(ptr[0])} to {int(ptr[-1])}")
    counts = ptr.diff()
    if counts.numel() and int(counts.min()) < 0:
        raise ValueError(f"row_ptr must not decrease, but does at row {int(counts.argmin())}")
    if col.numel() and (int(col.min()) < 0 or int(col.max()) >= cols):
        bad = int(col.min()) if int(col.min()) < 0 else int(col.max())
        raise ValueError(f"col_idx holds {bad}, out of range [0, {cols})")
    row = torch.arange(rows, device="cpu").repeat_interleave(counts)
    flat = row * cols + col
    if flat.numel() > 1 and not bool((flat[1:] > flat[:-1]).all()):
        at = int((flat[1:] <= flat[:-1]).nonzero()[0, 0]) + 1
        raise ValueError(
            f"col_idx must ascend strictly within a row, but not at entry {at} (row {int(row[at])}): "
            "a repeated or unsorted column"
        )
    return flat


def check_slot(slot: Tensor, n: int) -> Tensor:
    """Check that foreign slots are a permutation of `range(n)`; return them (`[n]` int64, CPU).

    Raises:
        ValueError, TypeError: what is wrong.
    """
    check_integers("slot", slot)
    if tuple(slot.shape) != (n,):
        raise ValueError(f"slot must have shape ({n},), got {tuple(slot.shape)}")
    slot = slot.detach().cpu().long()
    wrong = (slot.sort().values != torch.arange(n, device="cpu")).nonzero()
    if wrong.numel():
        raise ValueError(f"slot must hold every number from 0 to {n - 1} once, but not so {int(wrong[0])}")
    return slot
