"""Product of a block-sparse matrix with activations: `Y = X W^T (+ bias)`, and `dX = dY W` by the same code.

A program owns one row of blocks and a tile of tokens, and gathers the columns of X that its blocks need. Two
kernels: blocks of 64 outputs and more stand on the M side of the tensor cores, tiles of tokens on the N side
(wgmma takes 64 rows at least); for smaller blocks it is the other way round, several blocks to a step.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import Offsets
from .configs import Config
from .launch import Launch
from .tensor_map import tensor_map

#: Sizes of a batch or a topology: with values compiled in, every new one would cost a compilation.
_VARYING = ["rows", "token_tiles", "ptr_at", "idx_at", "slot_at", "order_at"]


@triton.jit
def _place(order, rows, token_tiles, WINDOW: tl.constexpr):
    """Row of blocks and token tile of this program: rows run fastest inside a window, then tiles.

    The programs at work together then read the same tiles of X, which stay in L2. Rows come by falling
    number of blocks, so that short ones fill the gaps at the end.
    """
    pid = tl.program_id(0)
    if WINDOW == 0:
        return tl.load(order + pid % rows), pid // rows
    per_window = WINDOW * token_tiles
    first = pid // per_window * WINDOW
    width = tl.minimum(rows - first, WINDOW)
    within = pid % per_window
    return tl.load(order + first + within % width), within // width


@triton.jit(do_not_specialize=_VARYING)
def bsr_spmm_wide_kernel(
    x_map,
    values_map,
    y_map,
    bias,
    index,
    ptr_at,
    idx_at,
    slot_at,
    order_at,
    rows,
    token_tiles,
    BT: tl.constexpr,
    OUT: tl.constexpr,
    INNER: tl.constexpr,
    STEP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc[OUT, BT] += block [OUT, STEP] @ X tile [BT, STEP]^T, both by TMA."""
    row, tile = _place(index + order_at, rows, token_tiles, WINDOW)
    ptr, idx, slot = index + ptr_at, index + idx_at, index + slot_at
    begin, end = tl.load(ptr + row), tl.load(ptr + row + 1)
    token = tile * BT
    PARTS: tl.constexpr = INNER // STEP
    acc = tl.zeros((OUT, BT), tl.float32)
    # The indices of the next step are carried along: loaded in their own step they would halve the depth of
    # the pipeline.
    some = end > begin
    column, block = tl.load(idx + begin, some, 0), tl.load(slot + begin, some, 0)
    for i in tl.range(0, (end - begin) * PARTS, num_stages=STAGES):
        inside = i % PARTS * STEP
        x = x_map.load([token, column * INNER + inside])
        if TRANSPOSED:
            w = values_map.load([block * INNER + inside, 0]).T
        else:
            w = values_map.load([block * OUT, inside])
        following = tl.minimum(begin + (i + 1) // PARTS, end - 1)
        column, block = tl.load(idx + following), tl.load(slot + following)
        acc = tl.dot(w, x.T, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + row * OUT + tl.arange(0, OUT)).to(tl.float32)[:, None]
    y_map.store([token, row * OUT], acc.T.to(y_map.dtype))


@triton.jit(do_not_specialize=[*_VARYING, "tokens"])
def bsr_spmm_narrow_kernel(
    x,
    values,
    y,
    bias,
    index,
    ptr_at,
    idx_at,
    slot_at,
    order_at,
    rows,
    token_tiles,
    tokens,
    x_stride,
    y_stride,
    BT: tl.constexpr,
    OUT: tl.constexpr,
    INNER: tl.constexpr,
    STEP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc[BT, OUT] += gathered X tile [BT, STEP] @ STEP / INNER blocks of the row."""
    row, tile = _place(index + order_at, rows, token_tiles, WINDOW)
    ptr, idx, slot = index + ptr_at, index + idx_at, index + slot_at
    begin, end = tl.load(ptr + row), tl.load(ptr + row + 1)
    GATHERED: tl.constexpr = STEP // INNER
    SIZE: tl.constexpr = OUT * INNER
    token = tile * BT + tl.arange(0, BT)
    there = token < tokens
    k = tl.arange(0, STEP)
    member, inside = k // INNER, k % INNER
    o = tl.arange(0, OUT)
    x_rows = x + token.to(tl.int64)[:, None] * x_stride
    acc = tl.zeros((BT, OUT), tl.float32)
    active = begin + member < end
    column = tl.load(idx + begin + member, active, 0)
    block = tl.load(slot + begin + member, active, 0)
    for i in tl.range(begin, end, GATHERED, num_stages=STAGES):
        active = i + member < end
        at = tl.max_contiguous(tl.multiple_of(column * INNER + inside, INNER), INNER)
        x_tile = tl.load(x_rows + at[None, :], there[:, None] & active[None, :], 0.0)
        first = block.to(tl.int64) * SIZE
        if TRANSPOSED:
            w = tl.load(values + (first + inside * OUT)[:, None] + o[None, :], active[:, None], 0.0)
        else:
            place = tl.max_contiguous(tl.multiple_of(first + inside, INNER), INNER)
            w = tl.load(values + place[None, :] + o[:, None] * INNER, active[None, :], 0.0).T
        following = i + GATHERED + member
        column = tl.load(idx + following, following < end, 0)
        block = tl.load(slot + following, following < end, 0)
        acc = tl.dot(x_tile, w, acc, input_precision=PRECISION)
    out = row * OUT + o
    if HAS_BIAS:
        acc += tl.load(bias + out).to(tl.float32)[None, :]
    tl.store(
        y + token.to(tl.int64)[:, None] * y_stride + out[None, :], acc.to(y.dtype.element_ty), there[:, None]
    )


def bsr_spmm(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Tensor,
    offsets: Offsets,
    out: Tensor,
    *,
    transposed: bool,
    config: Config,
    precision: str = "tf32",
) -> None:
    """Fill `out [tokens, outputs]`.

    Args:
        x: `[tokens, inputs]`, contiguous, 16-byte aligned.
        values: `[n, b_out, b_in]` of the same dtype.
        bias: `[outputs]` or None.
        index: the buffer of the topology, laid out as on a GPU.
        offsets: of the arrays in it.
        out: written wholly.
        transposed: multiply by the blocks' transposes, as dX does.
        config: of `configs.choose`.
        precision: of float32 products: "tf32" or "ieee".
    """
    tokens, inputs = x.shape
    n, b_out, b_in = values.shape
    outputs = out.shape[1]
    side, inner = (b_in, b_out) if transposed else (b_out, b_in)
    lists = offsets.by_columns if transposed else offsets.by_rows
    rows, tiles = outputs // side, -(-tokens // config.tokens)
    sizes: tuple[int, ...] = ()
    if side >= 64:
        stored = (config.step, side) if transposed else (side, config.step)
        operands = (
            tensor_map(x, tokens, inputs, (config.tokens, config.step)),
            tensor_map(values, n * b_out, b_in, stored),
            tensor_map(out, tokens, outputs, (config.tokens, side)),
        )
    else:
        operands, sizes = (x, values, out), (tokens, inputs, outputs)
    launch = _launch(side, inner, transposed, bias is not None, config, precision, x.dtype, x.device.index)
    launch((rows * tiles, 1, 1), *operands, bias, index, *lists, rows, tiles, *sizes)


@functools.lru_cache(maxsize=4096)
def _launch(
    side: int,
    inner: int,
    transposed: bool,
    has_bias: bool,
    config: Config,
    precision: str,
    dtype: torch.dtype,
    device: int | None,
) -> Launch:
    kernel = bsr_spmm_wide_kernel if side >= 64 else bsr_spmm_narrow_kernel
    return Launch(kernel, constants(side, inner, transposed, has_bias, config, precision))


def constants(
    side: int, inner: int, transposed: bool, has_bias: bool, config: Config, precision: str
) -> dict[str, int | bool | str]:
    """Compile-time arguments and options of a launch."""
    return {
        "BT": config.tokens,
        "OUT": side,
        "INNER": inner,
        "STEP": config.step,
        "TRANSPOSED": transposed,
        "HAS_BIAS": has_bias,
        "STAGES": config.stages,
        "WINDOW": config.window,
        "PRECISION": precision,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
