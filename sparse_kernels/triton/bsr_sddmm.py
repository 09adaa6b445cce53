"""Weight gradient at the active blocks: `dW[slot] = dY_row^T X_column`, contracted over the tokens.

A program owns a chunk, which is up to 256 columns' worth of blocks of one row, so that a tile of dY is loaded
once for all of them. Where there are too few chunks to fill the device the tokens are split, too; the parts
are then summed in a fixed order, so that a result repeats bit for bit.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import Offsets, chunk_entries
from .configs import Config
from .launch import Launch
from .tensor_map import tensor_map

#: Sizes of a batch or a topology: with values compiled in, every new one would cost a compilation.
_VARYING = [
    "chunk_row_at",
    "chunk_begin_at",
    "ptr_at",
    "idx_at",
    "slot_at",
    "rows",
    "blocks",
    "tokens",
    "tokens_per_split",
]


@triton.jit(do_not_specialize=_VARYING)
def bsr_sddmm_kernel(
    dy_map,
    x,
    out,
    index,
    chunk_row_at,
    chunk_begin_at,
    ptr_at,
    idx_at,
    slot_at,
    rows,
    blocks,
    tokens,
    tokens_per_split,
    x_stride,
    BT: tl.constexpr,
    OUT: tl.constexpr,
    INNER: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc[OUT, CHUNK * INNER] += dY tile [BT, OUT]^T @ gathered X tile, or its transpose for small blocks."""
    row_ptr, col_idx, slot = index + ptr_at, index + idx_at, index + slot_at
    row = tl.load(index + chunk_row_at + tl.program_id(0))
    if row >= rows:  # chunks are counted for the worst case
        return
    begin = tl.load(index + chunk_begin_at + tl.program_id(0))
    end = tl.minimum(begin + CHUNK, tl.load(row_ptr + row + 1))
    columns = tl.arange(0, CHUNK * INNER)
    member, inside = columns // INNER, columns % INNER
    active = begin + member < end
    column = tl.load(col_idx + begin + member, active, 0)
    at = tl.max_contiguous(tl.multiple_of(column * INNER + inside, INNER), INNER)
    first = tl.program_id(1) * tokens_per_split
    last = tl.minimum(first + tokens_per_split, tokens)
    o = tl.arange(0, OUT)
    # The tensor cores want 64 rows on their M side.
    BLOCKS_ON_M: tl.constexpr = OUT >= 64
    acc = tl.zeros((OUT, CHUNK * INNER) if BLOCKS_ON_M else (CHUNK * INNER, OUT), tl.float32)
    for token in tl.range(first, last, BT, num_stages=STAGES):
        t = token + tl.arange(0, BT)
        dy = dy_map.load([token, row * OUT])
        x_rows = x + t.to(tl.int64)[:, None] * x_stride
        x_tile = tl.load(x_rows + at[None, :], (t < last)[:, None] & active[None, :], 0.0)
        if BLOCKS_ON_M:
            acc = tl.dot(dy.T, x_tile, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x_tile.T, dy, acc, input_precision=PRECISION)
    block = tl.load(slot + begin + member, active, 0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64) * blocks
    place = out + (part + block) * (OUT * INNER) + inside
    if BLOCKS_ON_M:
        tl.store(place[None, :] + o[:, None] * INNER, acc.to(out.dtype.element_ty), active[None, :])
    else:
        tl.store(place[:, None] + o[None, :] * INNER, acc.to(out.dtype.element_ty), active[:, None])


def bsr_sddmm(
    dy: Tensor,
    x: Tensor,
    out: Tensor,
    index: Tensor,
    offsets: Offsets,
    *,
    config: Config,
    processors: int,
    precision: str = "tf32",
) -> None:
    """Fill `out [n, b_out, b_in]`.

    Args:
        dy: `[tokens, outputs]`, contiguous, 16-byte aligned.
        x: `[tokens, inputs]`, likewise.
        out: written wholly, dtype of `x`.
        index: the buffer of the topology, laid out as on a GPU.
        offsets: of the arrays in it.
        config: of `configs.choose`.
        processors: multiprocessors of the device.
        precision: of float32 products: "tf32" or "ieee".
    """
    n, b_out, b_in = out.shape
    tokens, chunks = x.shape[0], offsets.chunk_begin - offsets.chunk_row
    splits, per_split = split_tokens(tokens, n, b_in, config, processors)
    # A part of float32 sums for each split; one alone is stored in the dtype of the gradient.
    parts = out if splits == 1 else torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)
    launch = _launch(b_out, b_in, config, precision, x.dtype, splits == 1, x.device.index)
    launch(
        (chunks, splits, 1),
        tensor_map(dy, tokens, dy.shape[1], (config.tokens, b_out)), x, parts, index,
        offsets.chunk_row, offsets.chunk_begin, offsets.row_ptr, offsets.col_idx, offsets.slot,
        dy.shape[1] // b_out, n, tokens, per_split, x.shape[1],
    )  # fmt: skip
    if splits > 1:
        out.copy_(parts.sum(0))


@functools.lru_cache(maxsize=4096)
def _launch(
    b_out: int,
    b_in: int,
    config: Config,
    precision: str,
    dtype: torch.dtype,
    alone: bool,
    device: int | None,
) -> Launch:
    return Launch(bsr_sddmm_kernel, constants(b_out, b_in, config, precision))


def split_tokens(tokens: int, n: int, b_in: int, config: Config, processors: int) -> tuple[int, int]:
    """Into how many parts the tokens are split, and tokens of a part.

    About two programs for every multiprocessor, and no part shorter than 8 steps. A function of sizes alone:
    the same for every topology of a layer.
    """
    wanted = -(-2 * processors // max(1, n // chunk_entries(b_in)))
    steps = -(-tokens // config.tokens)
    splits = max(1, min(wanted, steps // 8, 16))
    per_split = -(-steps // splits) * config.tokens
    return -(-tokens // per_split), per_split


def constants(b_out: int, b_in: int, config: Config, precision: str) -> dict[str, int | str]:
    """Compile-time arguments and options of a launch."""
    return {
        "BT": config.tokens,
        "OUT": b_out,
        "INNER": b_in,
        "CHUNK": chunk_entries(b_in),
        "STAGES": config.stages,
        "PRECISION": precision,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
