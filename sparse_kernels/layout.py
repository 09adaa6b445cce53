"""Where the arrays of a topology stand in its one int32 buffer, on the CPU and on a GPU. Pure functions.

On every device, for `n` positions of a `rows x cols` grid:

    row_ptr [rows + 1] | col_idx [n] | col_ptr [groups * cols + 1] | row_idx [n] | perm [n]

and for blocks `slot [n]`: block i in row order has its values in `values[slot[i]]`; `perm[j]` is the same for
block j in column order. Values need not move when blocks come and go.

On a GPU, blocks have besides, so that no kernel starts a long row last and none has one all to itself:

    row_order [rows]            rows, those with the most blocks first
    col_order [groups * cols]   columns, likewise
    chunk_row [m]               runs of at most `chunk_entries` blocks of one row, in row order
    chunk_begin [m]             where each begins; unused ones: row `rows`, begin `n`

What follows for CSR weights on the CPU (plans of its kernels) is described in csrc/common/index.h; there
CSR weights of a Linear lack row_idx and perm.

Imports torch only.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor


class Arrays(NamedTuple):
    """Views of the buffer, all int32; None where a topology of this kind has no such array."""

    row_ptr: Tensor
    col_idx: Tensor
    col_ptr: Tensor
    row_idx: Tensor | None
    perm: Tensor | None
    slot: Tensor | None
    row_order: Tensor | None
    col_order: Tensor | None
    chunk_row: Tensor | None
    chunk_begin: Tensor | None


def chunk_entries(b_in: int) -> int:
    """Most blocks in a chunk: about 256 columns of the weight."""
    return max(1, 256 // b_in)


def chunk_count(n: int, rows: int, b_in: int) -> int:
    """Chunks that `n` blocks in `rows` rows need at most, whatever their rows."""
    return rows + n // chunk_entries(b_in)


def sizes(
    n: int,
    rows: int,
    cols: int,
    groups: int,
    blocks: bool,
    gpu: bool,
    b_in: int = 1,
    transposed: bool = True,
) -> dict[str, int]:
    """The arrays of a topology and their sizes, in order.

    Args:
        n: active positions.
        rows, cols, groups: the block grid; each group has its own `cols` columns.
        blocks: BSR, not CSR.
        gpu: as on a GPU.
        b_in: inner size of a block (read for blocks on a GPU only).
        transposed: whether row_idx and perm are stored (all but CSR weights of a Linear on the CPU).
    """
    found = {"row_ptr": rows + 1, "col_idx": n, "col_ptr": groups * cols + 1}
    if transposed:
        found |= {"row_idx": n, "perm": n}
    if blocks:
        found["slot"] = n
    if blocks and gpu:
        chunks = chunk_count(n, rows, b_in)
        found |= {"row_order": rows, "col_order": groups * cols, "chunk_row": chunks, "chunk_begin": chunks}
    return found


def split(
    index: Tensor,
    n: int,
    rows: int,
    cols: int,
    groups: int,
    blocks: bool,
    gpu: bool,
    b_in: int = 1,
    transposed: bool = True,
) -> Arrays:
    """The arrays inside `index`, as views. Arguments as in `sizes`; what follows them is ignored.

    Raises:
        ValueError: `index` is too short for them.
    """
    wanted = sizes(n, rows, cols, groups, blocks, gpu, b_in, transposed)
    total = sum(wanted.values())
    if index.dim() != 1 or index.numel() < total:
        raise ValueError(
            f"the index of {n} positions in {rows} x {cols} must have at least {total} entries, got shape "
            f"{tuple(index.shape)}: it belongs to another topology or layout"
        )
    views = dict(zip(wanted, index[:total].split(list(wanted.values())), strict=True))
    return Arrays(*(views.get(name) for name in Arrays._fields))  # type: ignore[arg-type]


class Offsets(NamedTuple):
    """Where the arrays of blocks on a GPU begin in the buffer: what its kernels are given."""

    row_ptr: int
    col_idx: int
    col_ptr: int
    row_idx: int
    perm: int
    slot: int
    row_order: int
    col_order: int
    chunk_row: int
    chunk_begin: int
    end: int

    @property
    def by_rows(self) -> tuple[int, int, int, int]:
        """Pointers, columns, slots and order of the rows: what the output needs."""
        return self.row_ptr, self.col_idx, self.slot, self.row_order

    @property
    def by_columns(self) -> tuple[int, int, int, int]:
        """The same of the columns, for the input gradient."""
        return self.col_ptr, self.row_idx, self.perm, self.col_order


@functools.lru_cache(maxsize=4096)
def offsets(n: int, rows: int, cols: int, b_in: int, groups: int = 1) -> Offsets:
    """The offsets for `n` blocks. Kept, since every product asks for them."""
    return Offsets(*itertools.accumulate(sizes(n, rows, cols, groups, True, True, b_in).values(), initial=0))


def column_keys(row: Tensor, col: Tensor, rows: int, cols: int, groups: int) -> Tensor:
    """The column of each position among those of all groups."""
    if groups == 1:
        return col
    return row.div(max(1, rows // groups), rounding_mode="floor") * cols + col


def tail(row_ptr: Tensor, col_ptr: Tensor, n: int, b_in: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What blocks have besides on a GPU: row_order, col_order, chunk_row, chunk_begin.

    Reads nothing on the host, and no shape depends on data: it may be captured in a CUDA graph.

    Args:
        row_ptr: `[rows + 1]` integers.
        col_ptr: `[groups * cols + 1]` integers.
        n: blocks.
        b_in: inner size of a block.
    """
    rows, most = row_ptr.numel() - 1, chunk_entries(b_in)
    counts = row_ptr.diff(prepend=row_ptr[:1])  # with a 0 before, so that sums begin with one
    starts = counts.add(most - 1).div_(most, rounding_mode="floor").cumsum(0)  # first chunk of every row
    place = torch.arange(chunk_count(n, rows, b_in), device=row_ptr.device)
    chunk_row = torch.searchsorted(starts[1:], place, right=True)
    base = torch.sub(row_ptr, starts, alpha=most)  # begin of a chunk, less most times its place
    chunk_begin = torch.add(base[chunk_row], place, alpha=most).clamp_(max=n)
    row_order = counts[1:].argsort(descending=True, stable=True)
    col_order = col_ptr.diff().argsort(descending=True, stable=True)
    return row_order, col_order, chunk_row, chunk_begin
