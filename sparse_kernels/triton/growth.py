"""Growth scores from a dense weight gradient that never leaves the chip.

Every program computes one tile of `dY^T X` over all tokens on the tensor cores, as a dense weight gradient
would, and keeps only what the topology update asks for: the norms of the blocks in it (`block_norms`), or the
entries above a threshold (`candidates`, single weights). Memory is O(blocks), or O(candidates).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import GROWTH_TILE, Config
from .tensor_map import tensor_map

TILE_OUT, WIDE_IN = GROWTH_TILE
TILE_IN = 128  # for candidates, whose epilogue needs more registers
BINS = 256  # of a histogram: eight bits of |g| or of a position


@triton.jit
def _gradient_tile(
    dy_map,
    x_map,
    tokens,
    BT: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of dY^T X; out of range it is zero."""
    row, col = tl.program_id(0) * TILE_OUT, tl.program_id(1) * TILE_IN
    acc = tl.zeros((TILE_OUT, TILE_IN), tl.float32)
    for token in tl.range(0, tokens, BT, num_stages=STAGES):
        dy = dy_map.load([token, row])
        x = x_map.load([token, col])
        acc = tl.dot(dy.T, x, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["tokens", "rows", "cols"])
def block_norms_kernel(
    dy_map,
    x_map,
    scores,
    tokens,
    rows,
    cols,
    BT: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    B_OUT: tl.constexpr,
    B_IN: tl.constexpr,
    SQUARES: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of |g|, or of squares and the root of them, over every block of the tile."""
    g = _gradient_tile(dy_map, x_map, tokens, BT, TILE_OUT, TILE_IN, STAGES, PRECISION)
    ROWS: tl.constexpr = TILE_OUT // B_OUT
    COLS: tl.constexpr = TILE_IN // B_IN
    g = g * g if SQUARES else tl.abs(g)
    sums = tl.sum(tl.sum(g.reshape(ROWS, B_OUT, COLS, B_IN), 3), 1)
    if SQUARES:
        sums = tl.sqrt(sums)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    there = (row < rows)[:, None] & (col < cols)[None, :]
    tl.store(scores + row[:, None].to(tl.int64) * cols + col[None, :], sums, there)


@triton.jit
def _quarter(g, WHICH: tl.constexpr):
    """Columns WHICH, WHICH + 4, ... of a tile: epilogues in parts need fewer registers."""
    rows: tl.constexpr = g.shape[0]
    cols: tl.constexpr = g.shape[1]
    even, odd = tl.split(g.reshape(rows, cols // 2, 2))
    half = odd if WHICH % 2 else even
    low, high = tl.split(half.reshape(rows, cols // 4, 2))
    return high if WHICH // 2 else low


# What `candidates` keeps on the device between its kernels, int32 each.
_RUN, _FOUND, _BROKEN, _VALUE, _PLACE, _ABOVE, _STATE = range(7)
RUN, FOUND, BROKEN = tl.constexpr(_RUN), tl.constexpr(_FOUND), tl.constexpr(_BROKEN)
VALUE, PLACE, ABOVE = tl.constexpr(_VALUE), tl.constexpr(_PLACE), tl.constexpr(_ABOVE)


@triton.jit(do_not_specialize=["tokens", "outputs", "inputs", "capacity"])
def collect_kernel(
    dy_map,
    x_map,
    state,
    positions,
    scores,
    tokens,
    outputs,
    inputs,
    capacity,
    BT: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Append to a list what is not behind (VALUE, PLACE) in the order (|g| falling, position rising)."""
    if tl.load(state + RUN) == 0:
        return
    g = tl.abs(_gradient_tile(dy_map, x_map, tokens, BT, TILE_OUT, TILE_IN, STAGES, PRECISION))
    row = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    least, last = tl.load(state + VALUE), tl.load(state + PLACE)
    tl.atomic_max(state + BROKEN, tl.max((g.to(tl.int32, bitcast=True) >= 0x7F800000).to(tl.int32)))
    for which in tl.static_range(4):
        part = _quarter(g, which)
        bits = part.to(tl.int32, bitcast=True)
        col = tl.program_id(1) * TILE_IN + which + 4 * tl.arange(0, TILE_IN // 4)
        position = row[:, None] * inputs + col[None, :]
        chosen = (bits > least) | ((bits == least) & (position <= last))
        chosen = chosen & (row < outputs)[:, None] & (col < inputs)[None, :]
        count = chosen.to(tl.int32)
        first = tl.atomic_add(state + FOUND + tl.zeros((TILE_OUT,), tl.int32), tl.sum(count, 1))
        place = first[:, None] + tl.cumsum(count, 1) - 1
        fits = chosen & (place < capacity)
        tl.store(positions + place, position, fits)
        tl.store(scores + place, part, fits)


@triton.jit(do_not_specialize=["tokens", "outputs", "inputs"])
def histogram_kernel(
    dy_map,
    x_map,
    state,
    histogram,
    tokens,
    outputs,
    inputs,
    BT: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    BINS: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    BY_PLACE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Count by one digit of |g| those that agree with VALUE in the digits before, or of the position."""
    if tl.load(state + RUN) == 0:
        return
    g = tl.abs(_gradient_tile(dy_map, x_map, tokens, BT, TILE_OUT, TILE_IN, STAGES, PRECISION))
    row = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    value, at = tl.load(state + VALUE), tl.load(state + PLACE)
    SIZE: tl.constexpr = TILE_OUT * TILE_IN // 4
    for which in tl.static_range(4):
        bits = _quarter(g, which).to(tl.int32, bitcast=True)
        col = tl.program_id(1) * TILE_IN + which + 4 * tl.arange(0, TILE_IN // 4)
        counted = (row < outputs)[:, None] & (col < inputs)[None, :]
        if BY_PLACE:
            # Low positions come first: as large digits do.
            digits = 0x7FFFFFFF - (row[:, None] * inputs + col[None, :])
            counted = counted & (bits == value)
            prefix = 0x7FFFFFFF - at
        else:
            digits, prefix = bits, value
        if SHIFT + WIDTH < 31:
            counted = counted & (digits >> (SHIFT + WIDTH) == prefix >> (SHIFT + WIDTH))
        digit = tl.reshape((digits >> SHIFT) & ((1 << WIDTH) - 1), (SIZE,))
        of_tile = tl.histogram(digit, BINS, tl.reshape(counted, (SIZE,)))
        tl.atomic_add(histogram + tl.arange(0, BINS), of_tile)


@triton.jit(do_not_specialize=["wanted", "capacity"])
def pick_kernel(
    state,
    histogram,
    wanted,
    capacity,
    BINS: tl.constexpr,
    SHIFT: tl.constexpr,
    BY_PLACE: tl.constexpr,
):
    """Fix one digit: the largest from which on at least `wanted` entries come first. Stop if they fit."""
    if tl.load(state + RUN) == 0:
        return
    bins = tl.arange(0, BINS)
    count = tl.load(histogram + bins)
    from_here = tl.sum(count, 0) - tl.cumsum(count, 0) + count
    above = tl.load(state + ABOVE)
    digit = tl.max(tl.where(above + from_here >= wanted, bins, 0))
    here = above + tl.sum(tl.where(bins == digit, from_here, 0))
    tl.store(state + ABOVE, here - tl.sum(tl.where(bins == digit, count, 0)))
    if BY_PLACE:
        tl.store(state + PLACE, tl.load(state + PLACE) - (digit << SHIFT))
    else:
        tl.store(state + VALUE, tl.load(state + VALUE) + (digit << SHIFT))
    tl.store(state + RUN, (here > capacity).to(tl.int32))
    tl.store(histogram + bins, tl.zeros((BINS,), tl.int32))


def block_norms(
    x: Tensor,
    dy: Tensor,
    b_out: int,
    b_in: int,
    score: str,
    *,
    config: Config,
    precision: str = "tf32",
) -> Tensor:
    """Norms of the blocks of `dY^T X`, `[outputs / b_out, inputs / b_in]` float32.

    Args:
        x: `[tokens, inputs]`, contiguous, 16-byte aligned.
        dy: `[tokens, outputs]`, likewise.
        b_out, b_in: powers of two up to 128.
        score: `"l1"` (sum of absolute values) or `"l2"`.
        config: of `configs.choose`.
        precision: of float32 products: "tf32" or "ieee".
    """
    tokens, inputs = x.shape
    outputs = dy.shape[1]
    rows, cols = outputs // b_out, inputs // b_in
    scores = torch.empty(rows, cols, dtype=torch.float32, device=x.device)
    block_norms_kernel[_grid(outputs, inputs, WIDE_IN)](
        *_maps(dy, x, WIDE_IN, config), scores, tokens, rows, cols,
        **constants(config, precision), TILE_IN=WIDE_IN, B_OUT=b_out, B_IN=b_in, SQUARES=score == "l2",
    )  # fmt: skip
    return scores


def candidates(
    x: Tensor,
    dy: Tensor,
    active: Tensor,
    k: int,
    guess: Tensor,
    *,
    config: Config,
    precision: str = "tf32",
) -> tuple[Tensor, Tensor, Tensor]:
    """A list of entries of `|dY^T X|` that the k best inactive ones are in, without a read on the host.

    Best: in the order (value falling, position rising). A first pass collects what reaches `guess`, such as
    a share of the last update's cut. Only if that is too few or too many, the device goes on by itself: digit
    by digit, histograms give a cut that `n + k` entries reach, and no more than the list holds, and a second
    pass collects those. Each of these passes multiplies again; those not needed return at once.

    Args:
        x, dy: as for `block_norms`; see `takes`.
        active: `[n]` flat positions of active entries, ascending.
        k: inactive entries wanted.
        guess: 0-d float32 on the device, infinite if there is none.

    Returns:
        positions: `[capacity(n, k)]` int32 flat positions in no order, active ones too; -1 behind the last.
        scores: `[capacity(n, k)]` float32, -inf behind the last.
        finite: 0-d bool, whether all of the gradient is.
    """
    device = x.device
    tokens, inputs = x.shape
    outputs = dy.shape[1]
    most = capacity(active.numel(), k)
    positions = torch.full((most,), -1, dtype=torch.int32, device=device)
    scores = torch.full((most,), -torch.inf, dtype=torch.float32, device=device)
    histogram = torch.zeros(BINS, dtype=torch.int32, device=device)
    state = torch.zeros(_STATE, dtype=torch.int32, device=device)
    state[_RUN] = guess.isfinite()
    state[_VALUE] = guess.view(torch.int32)
    state[_PLACE].fill_(_LAST)  # a number that is assigned would be copied from the host
    maps, grid, fixed = (
        _maps(dy, x, TILE_IN, config),
        _grid(outputs, inputs, TILE_IN),
        {**constants(config, precision), "TILE_IN": TILE_IN},
    )
    collect = (*maps, state, positions, scores, tokens, outputs, inputs, most)
    collect_kernel[grid](*collect, **fixed)

    wanted = min(k, outputs * inputs - active.numel())
    enough = ((positions >= 0) & ~contains(active, positions)).sum() >= wanted
    again = ~enough | (state[_FOUND] > most)
    state[_RUN] = again
    for register, value in ((_FOUND, 0), (_VALUE, 0), (_PLACE, _LAST)):
        state[register].masked_fill_(again, value)
    positions.masked_fill_(again, -1)
    scores.masked_fill_(again, -torch.inf)
    enough_for_all = min(active.numel() + k, outputs * inputs)
    for by_place in (False, True):
        for shift, width in _DIGITS:
            digit = {"BINS": BINS, "SHIFT": shift, "BY_PLACE": by_place}
            sizes = (tokens, outputs, inputs)
            histogram_kernel[grid](*maps, state, histogram, *sizes, **fixed, **digit, WIDTH=width)
            pick_kernel[(1,)](state, histogram, enough_for_all, most, **digit)
    state[_RUN] = again
    collect_kernel[grid](*collect, **fixed)
    return positions, scores, state[_BROKEN] == 0


_LAST = 2**31 - 1
_DIGITS = ((23, 8), (15, 8), (7, 8), (0, 7))  # of 31 bits: shift and width


def capacity(n: int, k: int) -> int:
    """Length of the list: what n active entries and k others may need, and room for a good guess."""
    return n + 2 * k + 65_536


def contains(ascending: Tensor, wanted: Tensor) -> Tensor:
    """Which of `wanted` are in `ascending`."""
    if ascending.numel() == 0:
        return torch.zeros_like(wanted, dtype=torch.bool)
    wanted = wanted.to(ascending.dtype)
    at = torch.searchsorted(ascending, wanted).clamp_max(ascending.numel() - 1)
    return ascending[at] == wanted


def takes(x: Tensor, dy: Tensor) -> bool:
    """Whether `candidates` can read these matrices: TMA wants memory and rows that start on 16 bytes."""
    aligned = all(t.shape[1] * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in (x, dy))
    some = min(*x.shape, *dy.shape) > 0 and x.shape[1] * dy.shape[1] < 2**31
    return aligned and some and x.dtype in (torch.bfloat16, torch.float16, torch.float32)


def _grid(outputs: int, inputs: int, width: int) -> tuple[int, int]:
    return triton.cdiv(outputs, TILE_OUT), triton.cdiv(inputs, width)


def _maps(dy: Tensor, x: Tensor, width: int, config: Config) -> tuple[object, object]:
    tokens = x.shape[0]
    return (
        tensor_map(dy, tokens, dy.shape[1], (config.tokens, TILE_OUT)),
        tensor_map(x, tokens, x.shape[1], (config.tokens, width)),
    )


def constants(config: Config, precision: str) -> dict[str, int | str]:
    """Compile-time arguments and options that both kernels share."""
    return {
        "BT": config.tokens,
        "TILE_OUT": TILE_OUT,
        "STAGES": config.stages,
        "PRECISION": precision,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
