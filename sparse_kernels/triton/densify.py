"""Between active values and dense weights: scatter into a zeroed scratch, and sample a dense gradient.

One program walks a share of the blocks of a row (single weights are blocks of 1 x 1, many to a step).
`taps` is kernel height times width of a convolution, whose weight `[out, in, kh, kw]` has them innermost.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_its_device

ENTRIES = 1024  # weights of a step
SHARE = 16  # programs of a row of blocks


@triton.jit(
    do_not_specialize=["first_row", "columns"],
    do_not_specialize_on_alignment=["row_ptr", "col_idx", "slot"],  # views into one buffer
)
def dense_place_kernel(
    values,
    dense,
    row_ptr,
    col_idx,
    slot,
    first_row,
    columns,
    B_OUT: tl.constexpr,
    B_IN: tl.constexpr,
    TAPS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCKS: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    """dense[place of entry] = values[entry], or with SAMPLE the other way round.

    `dense` holds the rows of blocks from `first_row` on, as many as the grid has.
    """
    row = first_row + tl.program_id(0)
    begin, end = tl.load(row_ptr + row), tl.load(row_ptr + row + 1)
    SIZE: tl.constexpr = B_OUT * B_IN
    inside = tl.arange(0, AT_ONCE * SIZE)
    member, o, i = inside // SIZE, inside % SIZE // B_IN, inside % B_IN
    top = dense + tl.program_id(0).to(tl.int64) * B_OUT * columns * B_IN
    for at in range(begin + tl.program_id(1) * AT_ONCE, end, tl.num_programs(1) * AT_ONCE):
        entry = at + member
        there = entry < end
        column = tl.load(col_idx + entry, there, 0)
        block = tl.load(slot + entry, there, 0) if BLOCKS else entry
        source = values + block.to(tl.int64) * SIZE + o * B_IN + i
        channel, tap = column // TAPS * B_IN + i, column % TAPS
        place = top + o.to(tl.int64) * columns * B_IN + channel * TAPS + tap
        if SAMPLE:
            tl.store(source, tl.load(place, there, 0.0).to(values.dtype.element_ty), there)
        else:
            tl.store(place, tl.load(source, there, 0.0).to(dense.dtype.element_ty), there)


def scatter(
    values: Tensor, dense: Tensor, row_ptr: Tensor, col_idx: Tensor, slot: Tensor | None, taps: int
) -> None:
    """Fill `dense [out, ...]` (contiguous) with zeros and the active values."""
    dense.zero_()
    _launch(values, dense, row_ptr, col_idx, slot, taps, 0, row_ptr.shape[0] - 1, sample=False)


def sample(
    stripe: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    slot: Tensor | None,
    taps: int,
    begin: int,
    end: int,
) -> None:
    """Copy the active entries of `stripe`, rows of blocks `begin:end` of a dense gradient, into `values`."""
    _launch(values, stripe, row_ptr, col_idx, slot, taps, begin, end, sample=True)


@on_its_device
def _launch(
    values: Tensor,
    dense: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    slot: Tensor | None,
    taps: int,
    begin: int,
    end: int,
    sample: bool,
) -> None:
    b_out, b_in = (1, 1) if values.dim() == 1 else values.shape[1:]
    if values.numel() == 0 or end <= begin:
        return
    columns = dense.numel() // ((end - begin) * b_out * b_in)
    dense_place_kernel[(end - begin, SHARE if b_out * b_in > 1 else 1)](
        values, dense, row_ptr, col_idx, slot, begin, columns, **constants(b_out, b_in, taps, sample)
    )


def constants(b_out: int, b_in: int, taps: int, sample: bool) -> dict[str, int | bool]:
    """Compile-time arguments and options of a launch."""
    return {
        "B_OUT": b_out,
        "B_IN": b_in,
        "TAPS": taps,
        "AT_ONCE": max(1, ENTRIES // (b_out * b_in)),
        "BLOCKS": b_out * b_in > 1,
        "SAMPLE": sample,
        "num_warps": 4 if b_out * b_in <= 4096 else 16,
        "num_stages": 2,
    }


def takes(values: Tensor) -> bool:
    """Whether the kernels take blocks of this size (a tile has a power of two entries)."""
    sides = (1, 1) if values.dim() == 1 else values.shape[1:]
    return values.dtype is not torch.float64 and all(n & (n - 1) == 0 and 0 < n <= 128 for n in sides)
