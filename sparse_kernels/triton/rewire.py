"""A topology update of blocks in a few kernels, with the results of the torch path of rewiring.py.

    entries   the grid of positions: which entry of the list stands there; keys of the drop scores
    cut       the k-th smallest key: what lies before it is dropped
    gains     keys of the growth scores; what is kept has one that is never reached
    cut       the k-th largest score: what lies before it is grown
    counts    what is active afterwards, what comes and what goes: by rows and by columns
    scan      their running sums: row_ptr, col_ptr, first chunks
    rows      col_idx, slot, row_order and the chunks
    columns   row_idx, perm and col_order

Scores become integers in the same order (selection.py), so that a cut is exact: a key, and how far ties at it
are taken. Results are the same bit for bit: nothing is summed by atomics in global memory, and every number
has one writer. No kernel's grid depends on data: all of it may be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import layout
from . import selection
from .launch import Launch, aligned, on_its_device
from .selection import NEVER, before_cut, key_of

POSITIONS = 2**18  # most that are taken: one program reads all of them for a cut
LANES = 512  # entries of a row, or rows, that a program takes at once
COLUMN_TILE = (64, 16)


@triton.jit(do_not_specialize=["ptr_at", "idx_at", "slot_at", "entry_at", "key_at", "cols"])
def entries_kernel(
    index, drop_scores, work, ptr_at, idx_at, slot_at, entry_at, key_at, cols, LANES: tl.constexpr
):
    """One program a row: entry[position], -1 where none is; key[entry] of the scores, which are by slot."""
    row = tl.program_id(0)
    entry = work + entry_at + row * cols
    lane = tl.arange(0, LANES)
    for first in range(0, cols, LANES):
        tl.store(entry + first + lane, -1, first + lane < cols)
    tl.debug_barrier()  # other threads write to the same places now
    end = tl.load(index + ptr_at + row + 1)
    for first in range(tl.load(index + ptr_at + row), end, LANES):
        i = first + lane
        there = i < end
        tl.store(entry + tl.load(index + idx_at + i, there, 0), i, there)
        score = tl.load(drop_scores + tl.load(index + slot_at + i, there, 0), there, 0.0)
        tl.store(work + key_at + i, key_of(score), there)


@triton.jit(do_not_specialize=["entry_at", "key_at", "gain_at", "cut_at", "total"])
def gains_kernel(scores, work, entry_at, key_at, gain_at, cut_at, total, LANES: tl.constexpr):
    """Keys by which the largest score comes first, for all positions but those that are kept."""
    place = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there = place < total
    entry = tl.load(work + entry_at + place, there, -1)
    key = tl.load(work + key_at + entry, entry >= 0, 0)
    kept = (entry >= 0) & (before_cut(key, entry, work + cut_at) == 0)
    score = tl.load(scores + place, there, 0.0)
    tl.store(work + gain_at + place, tl.where(kept, NEVER, ~key_of(score)), there)


@triton.jit
def _state(work, entry_at, gain_at, cut_at, ok, place, there):
    """Of positions: the entry there was, or -1; whether they are active afterwards."""
    entry = tl.load(work + entry_at + place, there, -1)
    gain = tl.load(work + gain_at + place, there, 0)
    after = (gain == NEVER) | before_cut(gain, place, work + cut_at)
    return entry, tl.where(tl.load(ok), after, entry >= 0) & there


@triton.jit(
    do_not_specialize=[
        "ptr_at", "slot_at", "entry_at", "gain_at", "cut_at", "gone_at", "rows_at", "count_at",
        "rows", "cols", "groups", "tiles",
    ]
)  # fmt: skip
def counts_kernel(
    index,
    work,
    ok,
    ptr_at,
    slot_at,
    entry_at,
    gain_at,
    cut_at,
    gone_at,
    rows_at,
    count_at,
    rows,
    cols,
    groups,
    tiles,
    LANES: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program a row, then one for every `WIDE` columns of a group.

    rows_at: for each row how many are active afterwards, come, go. gone_at: slots of those that go, which
    begin where the entries of their row do.
    """
    row = tl.program_id(0)
    if row < rows:
        lane = tl.arange(0, LANES)
        begin = tl.load(index + ptr_at + row)
        active, comes, goes = 0, 0, 0
        for first in range(0, cols, LANES):
            col = first + lane
            entry, after = _state(work, entry_at, gain_at, cut_at, ok, row * cols + col, col < cols)
            leaves = (entry >= 0) & (after == 0)
            place = begin + goes + tl.cumsum(leaves.to(tl.int32), 0) - 1
            slot = tl.load(index + slot_at + entry, leaves, 0)
            tl.store(work + gone_at + place, slot, leaves)
            active += tl.sum(after.to(tl.int32))
            comes += tl.sum((after & (entry < 0)).to(tl.int32))
            goes += tl.sum(leaves.to(tl.int32))
        tl.store(work + rows_at + row, active)
        tl.store(work + rows_at + rows + row, comes)
        tl.store(work + rows_at + 2 * rows + row, goes)
    else:
        group, tile = (row - rows) // tiles, (row - rows) % tiles
        col = tile * WIDE + tl.arange(0, WIDE)
        high = rows // groups
        counts = tl.zeros((WIDE,), tl.int32)
        for first in range(0, high, TALL):
            inside = first + tl.arange(0, TALL)
            there = (inside < high)[:, None] & (col < cols)[None, :]
            place = (group * high + inside)[:, None] * cols + col[None, :]
            entry, after = _state(work, entry_at, gain_at, cut_at, ok, place, there)
            counts += tl.sum(after.to(tl.int32), 0)
        tl.store(work + count_at + group * cols + col, counts, col < cols)


@triton.jit(
    do_not_specialize=["ptr_at", "col_ptr_at", "rows_at", "sums_at", "count_at", "rows", "columns", "most"]
)
def scan_kernel(
    new,
    work,
    replaced,
    ptr_at,
    col_ptr_at,
    rows_at,
    sums_at,
    count_at,
    rows,
    columns,
    most,
    LANES: tl.constexpr,
):
    """Two programs: sums over rows, and over columns.

    sums_at: for each row how many come before it, how many go up to its end, and its first chunk of `most`
    blocks; behind that of the last row the number of chunks.
    """
    lane = tl.arange(0, LANES)
    if tl.program_id(0) == 0:
        placed, came, gone, chunks = 0, 0, 0, 0
        for first in range(0, rows, LANES):
            row = first + lane
            there = row < rows
            active = tl.load(work + rows_at + row, there, 0)
            comes = tl.load(work + rows_at + rows + row, there, 0)
            goes = tl.load(work + rows_at + 2 * rows + row, there, 0)
            parts = (active + most - 1) // most
            tl.store(new + ptr_at + 1 + row, placed + tl.cumsum(active, 0), there)
            tl.store(work + sums_at + row, came + tl.cumsum(comes, 0) - comes, there)
            tl.store(work + sums_at + rows + row, gone + tl.cumsum(goes, 0), there)
            tl.store(work + sums_at + 2 * rows + row, chunks + tl.cumsum(parts, 0) - parts, there)
            placed += tl.sum(active)
            came += tl.sum(comes)
            gone += tl.sum(goes)
            chunks += tl.sum(parts)
        tl.store(new + ptr_at, 0)
        tl.store(work + sums_at + 3 * rows, chunks)
        tl.store(replaced, came)
    else:
        placed = 0
        for first in range(0, columns, LANES):
            column = first + lane
            count = tl.load(work + count_at + column, column < columns, 0)
            tl.store(new + col_ptr_at + 1 + column, placed + tl.cumsum(count, 0), column < columns)
            placed += tl.sum(count)
        tl.store(new + col_ptr_at, 0)


@triton.jit(
    do_not_specialize=[
        "old_ptr_at", "old_slot_at", "ptr_at", "idx_at", "slot_at", "order_at", "chunk_row_at",
        "chunk_begin_at", "entry_at", "gain_at", "cut_at", "gone_at", "placed_at", "sums_at", "rows", "cols",
        "n", "most", "chunks", "halvings",
    ]
)  # fmt: skip
def rows_kernel(
    index,
    new,
    work,
    fresh_slots,
    ok,
    ptr_at,
    idx_at,
    slot_at,
    order_at,
    chunk_row_at,
    chunk_begin_at,
    entry_at,
    gain_at,
    cut_at,
    gone_at,
    placed_at,
    sums_at,
    rows,
    cols,
    n,
    most,
    chunks,
    halvings,
    LANES: tl.constexpr,
):
    """One program a row, and one for the chunks that are left over.

    The i-th block that comes takes the slot of the i-th that goes, which is in the first row with more than i
    that go up to its end. placed_at: slots by position, -1 where nothing is active afterwards.
    """
    row = tl.program_id(0)
    lane = tl.arange(0, LANES)
    if row == rows:
        for first in range(tl.load(work + sums_at + 3 * rows), chunks, LANES):
            tl.store(new + chunk_row_at + first + lane, rows, first + lane < chunks)
            tl.store(new + chunk_begin_at + first + lane, n, first + lane < chunks)
    else:
        begin, end = tl.load(new + ptr_at + row), tl.load(new + ptr_at + row + 1)
        came = tl.load(work + sums_at + row)
        gone_ends = work + sums_at + rows
        placed, arrived = 0, 0
        for first in range(0, cols, LANES):
            col = first + lane
            position = row * cols + col
            entry, after = _state(work, entry_at, gain_at, cut_at, ok, position, col < cols)
            fresh = after & (entry < 0)
            nth = came + arrived + tl.cumsum(fresh.to(tl.int32), 0) - 1
            low, high = tl.zeros((LANES,), tl.int32), tl.zeros((LANES,), tl.int32) + rows
            for _ in range(0, halvings):
                middle = (low + high) // 2
                search = fresh & (low < high)
                beyond = tl.load(gone_ends + middle, search, 0) <= nth
                low = tl.where(search & beyond, middle + 1, low)
                high = tl.where(search & (beyond == 0), middle, high)
            before = tl.load(gone_ends + low - 1, fresh & (low > 0), 0)
            source = tl.load(index + ptr_at + low, fresh, 0) + nth - before
            taken = tl.load(work + gone_at + source, fresh, 0)
            slot = tl.load(index + slot_at + entry, after & (entry >= 0), 0)
            slot = tl.where(fresh, taken, slot)
            place = begin + placed + tl.cumsum(after.to(tl.int32), 0) - 1
            tl.store(new + idx_at + place, col, after)
            tl.store(new + slot_at + place, slot, after)
            tl.store(work + placed_at + position, tl.where(after, slot, -1), col < cols)
            tl.store(fresh_slots + nth, slot, fresh)
            placed += tl.sum(after.to(tl.int32))
            arrived += tl.sum(fresh.to(tl.int32))
        rank = 0
        for first in range(0, rows, LANES):
            other = first + lane
            there = other < rows
            count = tl.load(new + ptr_at + other + 1, there, 0) - tl.load(new + ptr_at + other, there, 0)
            earlier = (count > end - begin) | ((count == end - begin) & (other < row))
            rank += tl.sum((earlier & there).to(tl.int32))
        tl.store(new + order_at + rank, row)
        chunk = tl.load(work + sums_at + 2 * rows + row)
        for first in range(0, (end - begin + most - 1) // most, LANES):
            there = (first + lane) * most < end - begin
            tl.store(new + chunk_row_at + chunk + first + lane, row, there)
            tl.store(new + chunk_begin_at + chunk + first + lane, begin + (first + lane) * most, there)


@triton.jit(
    do_not_specialize=[
        "col_ptr_at", "row_idx_at", "perm_at", "order_at", "placed_at", "rows", "cols", "groups", "tiles",
    ]
)  # fmt: skip
def columns_kernel(
    new,
    work,
    col_ptr_at,
    row_idx_at,
    perm_at,
    order_at,
    placed_at,
    rows,
    cols,
    groups,
    tiles,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program for every `WIDE` columns of a group."""
    group, high = tl.program_id(0) // tiles, rows // groups
    col = tl.program_id(0) % tiles * WIDE + tl.arange(0, WIDE)
    column = group * cols + col
    begin = tl.load(new + col_ptr_at + column, col < cols, 0)
    mine = tl.load(new + col_ptr_at + column + 1, col < cols, 0) - begin
    placed = tl.zeros((WIDE,), tl.int32)
    for first in range(0, high, TALL):
        row = group * high + first + tl.arange(0, TALL)
        there = (row < (group + 1) * high)[:, None] & (col < cols)[None, :]
        slot = tl.load(work + placed_at + row[:, None] * cols + col[None, :], there, -1)
        active = (slot >= 0).to(tl.int32)
        place = (begin + placed)[None, :] + tl.cumsum(active, 0) - 1
        tl.store(new + row_idx_at + place, row[:, None] + tl.zeros_like(slot), slot >= 0)
        tl.store(new + perm_at + place, slot, slot >= 0)
        placed += tl.sum(active, 0)
    rank = tl.zeros((WIDE,), tl.int32)
    for first in range(0, groups * cols, TALL):
        other = first + tl.arange(0, TALL)
        there = other < groups * cols
        start = tl.load(new + col_ptr_at + other, there, 0)
        count = (tl.load(new + col_ptr_at + other + 1, there, 0) - start)[:, None]
        tied = (count == mine[None, :]) & (other[:, None] < column[None, :])
        rank += tl.sum((((count > mine[None, :]) | tied) & there[:, None]).to(tl.int32), 0)
    tl.store(new + order_at + rank, column, col < cols)


class Work(NamedTuple):
    """Where the arrays between the kernels begin in one int32 buffer."""

    entry: int
    gain: int
    placed: int
    key: int
    gone: int
    rows: int
    sums: int
    columns: int
    drop_cut: int
    grow_cut: int
    end: int


@functools.lru_cache(maxsize=4096)
def work_offsets(n: int, rows: int, columns: int, total: int) -> Work:
    """The offsets for `n` blocks of `total` positions."""
    sizes = (total, total, total, n, n, 3 * rows, 3 * rows + 1, columns, 2, 2)
    return Work(*itertools.accumulate(sizes, initial=0))


@on_its_device
def plan(
    index: Tensor,
    n: int,
    rows: int,
    cols: int,
    groups: int,
    b_in: int,
    drop_scores: Tensor,
    scores: Tensor,
    k: int | Tensor,
    ok: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decide an update, in 8 launches.

    Args:
        index: int32, laid out as on a GPU, of `n` blocks.
        rows, cols, groups: the grid of blocks, of at most `POSITIONS`.
        b_in: inner size of a block.
        drop_scores: `[n]` float32 by slot, contiguous.
        scores: `[rows * cols]` float32, contiguous.
        k: int, or 0-d integer tensor on the device, in `[0, n]`.
        ok: 0-d bool on the device.

    Returns:
        index: the new one, int32.
        replaced: 0-d int64, how many blocks come.
        slots: `[n]` int32: those that they take over; what follows the first `replaced` is undefined.
    """
    columns, total, device = groups * cols, rows * cols, index.device
    at, w = layout.offsets(n, rows, cols, b_in, groups), work_offsets(n, rows, columns, total)
    most, tiles = layout.chunk_entries(b_in), triton.cdiv(cols, COLUMN_TILE[1])
    work = torch.empty(w.end, dtype=torch.int32, device=device)
    new = torch.empty(at.end, dtype=torch.int32, device=device)
    slots = torch.empty(n, dtype=torch.int32, device=device)
    replaced = torch.empty((), dtype=torch.int64, device=device)
    run, cut = _launches(device.index), selection.launch
    drop_scores, scores, ok = aligned(drop_scores), aligned(scores), aligned(ok)

    run["entries"](
        (rows, 1, 1), index, drop_scores, work, at.row_ptr, at.col_idx, at.slot, w.entry, w.key, cols
    )
    cut(work, w.key, w.drop_cut, n, k, n)
    run["gains"]((triton.cdiv(total, LANES), 1, 1), scores, work, w.entry, w.key, w.gain, w.drop_cut, total)
    cut(work, w.gain, w.grow_cut, total, k, n)
    run["counts"](
        (rows + groups * tiles, 1, 1), index, work, ok, at.row_ptr, at.slot, w.entry, w.gain, w.grow_cut,
        w.gone, w.rows, w.columns, rows, cols, groups, tiles,
    )  # fmt: skip
    run["scan"](
        (2, 1, 1), new, work, replaced, at.row_ptr, at.col_ptr, w.rows, w.sums, w.columns, rows, columns, most
    )
    run["rows"](
        (rows + 1, 1, 1), index, new, work, slots, ok, at.row_ptr, at.col_idx, at.slot, at.row_order,
        at.chunk_row, at.chunk_begin, w.entry, w.gain, w.grow_cut, w.gone, w.placed, w.sums, rows, cols, n,
        most, layout.chunk_count(n, rows, b_in), rows.bit_length(),
    )  # fmt: skip
    run["columns"](
        (groups * tiles, 1, 1), new, work, at.col_ptr, at.row_idx, at.perm, at.col_order, w.placed,
        rows, cols, groups, tiles,
    )  # fmt: skip
    return new, replaced, slots


@functools.lru_cache(maxsize=64)
def _launches(device: int | None) -> dict[str, Launch]:
    return {name: Launch(kernel, constants(name)) for name, kernel in KERNELS.items()}


KERNELS = {
    "entries": entries_kernel,
    "gains": gains_kernel,
    "counts": counts_kernel,
    "scan": scan_kernel,
    "rows": rows_kernel,
    "columns": columns_kernel,
}


def constants(name: str) -> dict[str, int]:
    """Compile-time arguments and options of one of `KERNELS`."""
    tile = {"TALL": COLUMN_TILE[0], "WIDE": COLUMN_TILE[1]}
    options = {"num_warps": 8 if name == "scan" else 4, "num_stages": 1}
    lanes = {"LANES": 2048 if name == "scan" else LANES}
    return {"columns": tile, "counts": lanes | tile}.get(name, lanes) | options
