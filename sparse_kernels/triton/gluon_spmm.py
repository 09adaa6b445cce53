"""Product of a block-sparse matrix with activations on Hopper (sm_90), by specialised warps.

`Y = X W^T (+ bias)` and `dX = dY W`, for bfloat16 and float16 and blocks whose sides are 64 or 128. A program
owns one row of blocks and a tile of tokens. Blocks stand on the M side of wgmma, tokens on the N side, so the
accumulator is the transposed tile `[outputs, tokens]`. One warp, the producer, walks the lists and fills a
ring of stages by TMA; the others, the consumer, multiply. Two barriers a stage pass it back and forth:

- `full` completes when the producer has announced the bytes (its one arrival) and all of them have come;
- `empty` completes when the consumer arrives, once.

A wgmma reads its stage until it has finished, and one is always in flight: having issued step i the consumer
waits for step i - 1 and only then gives the stage of step i - 1 back. So a ring has two stages at least. The
last stage is never given back: nothing follows, and the output tile is staged in the memory of the ring.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..layout import Offsets
from .configs import Config
from .launch import Launch
from .tensor_map import Address

SHARED_MEMORY_OF_SM = 233_472  # bytes that the thread blocks of one multiprocessor share
BESIDE_THE_RING = 1024 + 512  # bytes of each: the system's, and barriers and arguments of the partitions
REGISTERS_OF_SM = 65_536
ENOUGH_REGISTERS = 168  # at launch, for any tile
SPARE_REGISTERS = 26  # beside an accumulator: what ptxas asks for
PRODUCER_WARPS = 4  # setmaxnreg works on groups of four warps, so that one warp costs as much as four
PRODUCER_REGISTERS = gl.constexpr(24)  # the least there is; it holds addresses only


@gluon.jit
def _produce(
    x_map,
    values_map,
    idx,
    slot,
    x_ring,
    w_ring,
    full,
    empty,
    begin,
    end,
    token,
    OUT: gl.constexpr,
    INNER: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):
    """Fill the ring: `INNER / STEP` steps for each entry of the row."""
    BYTES: gl.constexpr = x_map.block_type.nbytes + values_map.block_type.nbytes
    stage = begin * 0
    # Waiting for the phase before the first returns at once: every stage starts empty.
    phase = stage + 1
    # Indices are carried one entry ahead: their latency hides behind the wait for an empty stage.
    some = begin < end
    column = gl.load(idx + begin, mask=some, other=0)
    block = gl.load(slot + begin, mask=some, other=0)
    for i in range(begin, end):
        more = i + 1 < end
        next_column = gl.load(idx + i + 1, mask=more, other=0)
        next_block = gl.load(slot + i + 1, mask=more, other=0)
        for part in gl.static_range(INNER // STEP):
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(ready, BYTES)
            tma.async_copy_global_to_shared(
                x_map, [token, column * INNER + part * STEP], ready, x_ring.index(stage)
            )
            if TRANSPOSED:
                at = [block * INNER + part * STEP, 0]
            else:
                at = [block * OUT, part * STEP]
            tma.async_copy_global_to_shared(values_map, at, ready, w_ring.index(stage))
            stage += 1
            phase = gl.where(stage == STAGES, phase ^ 1, phase)
            stage = gl.where(stage == STAGES, 0, stage)
        column = next_column
        block = next_block


@gluon.jit
def _consume(
    y_map,
    bias,
    x_ring,
    w_ring,
    full,
    empty,
    steps,
    token,
    row,
    BT: gl.constexpr,
    OUT: gl.constexpr,
    STAGES: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """Multiply what comes and store the tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BT, 16]
    )
    acc = gl.zeros((OUT, BT), gl.float32, layout)
    stage = steps * 0
    phase = steps * 0
    for i in range(steps):
        mbarrier.wait(full.index(stage), phase)
        w = w_ring.index(stage)
        if TRANSPOSED:
            w = w.permute((1, 0))
        acc = warpgroup_mma(w, x_ring.index(stage).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        # Computed, not carried: Triton drops a carried variable that starts as, and becomes, another one.
        previous = gl.where(stage == 0, STAGES, stage) - 1
        mbarrier.arrive(empty.index(previous), pred=i > 0)
        stage += 1
        phase = gl.where(stage == STAGES, phase ^ 1, phase)
        stage = gl.where(stage == STAGES, 0, stage)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    if HAS_BIAS:
        out = gl.arange(0, OUT, layout=gl.SliceLayout(1, layout))
        acc += gl.expand_dims(gl.load(bias + row * OUT + out).to(gl.float32), 1)
    # Every load has come by now. Other warps may still multiply, and read what is overwritten here.
    gl.thread_barrier()
    y = x_ring._reinterpret(y_map.dtype, [BT, OUT], y_map.layout)
    y.permute((1, 0)).store(acc.to(y_map.dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(y_map, [token, row * OUT], y)
    tma.store_wait(0)


#: Sizes of a batch or a topology: with values compiled in, every new one would cost a compilation.
_VARYING = ["rows", "token_tiles", "ptr_at", "idx_at", "slot_at", "order_at"]


@gluon.jit(do_not_specialize=_VARYING)
def gluon_spmm_kernel(
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
    BT: gl.constexpr,
    OUT: gl.constexpr,
    INNER: gl.constexpr,
    STEP: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    STAGES: gl.constexpr,
    WINDOW: gl.constexpr,
):
    """acc[OUT, BT] += block [OUT, STEP] @ X tile [BT, STEP]^T, over the entries of a row."""
    gl.static_assert(STAGES >= 2, "the consumer gives a stage back one step late")
    gl.static_assert(STAGES * STEP >= OUT, "the output tile must fit into the ring of X")
    # Rows run fastest inside a window, then tiles: programs at work together read the same tiles of X, which
    # stay in L2. Rows come by falling number of blocks, so that short ones fill the gaps at the end.
    pid = gl.program_id(0)
    if WINDOW == 0:
        tile = pid // rows
        place = pid % rows
    else:
        first = pid // (WINDOW * token_tiles) * WINDOW
        width = gl.minimum(rows - first, WINDOW)
        within = pid % (WINDOW * token_tiles)
        tile = within // width
        place = first + within % width
    ptr, idx, slot = index + ptr_at, index + idx_at, index + slot_at
    row = gl.load(index + order_at + place)
    begin = gl.load(ptr + row)
    end = gl.load(ptr + row + 1)

    x_ring = gl.allocate_shared_memory(x_map.dtype, [STAGES] + x_map.block_type.shape, x_map.layout)
    w_ring = gl.allocate_shared_memory(
        values_map.dtype, [STAGES] + values_map.block_type.shape, values_map.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()  # TMA must see the barriers as initialised

    gl.warp_specialize(
        [
            (
                _consume,
                (
                    y_map, bias, x_ring, w_ring, full, empty, (end - begin) * (INNER // STEP), tile * BT, row,
                    BT, OUT, STAGES, TRANSPOSED, HAS_BIAS,
                ),
            ),
            (
                _produce,
                (
                    x_map, values_map, idx, slot, x_ring, w_ring, full, empty, begin, end, tile * BT,
                    OUT, INNER, STEP, STAGES, TRANSPOSED,
                ),
            ),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip


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
) -> None:
    """Fill `out [tokens, outputs]`, none of whose operands may be empty.

    Args:
        x: `[tokens, inputs]`, bfloat16 or float16, rows contiguous; memory and rows start on 16 bytes.
        values: `[n, b_out, b_in]` of the same dtype, contiguous; sides 64 or 128.
        bias: `[outputs]` of any floating dtype, or None.
        index: the buffer of the topology, laid out as on a GPU.
        offsets: of the arrays in it.
        out: as x; written wholly, rows without blocks too.
        transposed: multiply by the blocks' transposes, as dX does.
        config: of `configs.warp_specialised`.
    """
    n, block_out, block_in = values.shape
    lists = offsets.by_columns if transposed else offsets.by_rows
    tokens, rows = x.shape[0], out.shape[1] // (block_in if transposed else block_out)
    x_box, values_box, out_box = _boxes(config, block_out, block_in, transposed)
    tiles = -(-tokens // config.tokens)
    launch = _launch(config, block_out, block_in, transposed, bias is not None, x.dtype, x.device.index)
    launch(
        (rows * tiles, 1, 1),
        _descriptor(x, x_box),
        _descriptor(values.view(n * block_out, block_in), values_box),
        _descriptor(out, out_box),
        bias, index, *lists, rows, tiles,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _launch(
    config: Config,
    block_out: int,
    block_in: int,
    transposed: bool,
    has_bias: bool,
    dtype: torch.dtype,
    device: int | None,
) -> Launch:
    constants = _constants(config, block_out, block_in, transposed, has_bias)
    return Launch(gluon_spmm_kernel, {**constants, **_options(config, block_out, block_in, transposed)})


@functools.lru_cache(maxsize=4096)
def _kept(
    address: int, dtype: torch.dtype, shape: tuple[int, int], stride: int, box: tuple[int, int]
) -> TensorDescriptor:
    return TensorDescriptor(Address(address, dtype), list(shape), [stride, 1], list(box), _layout(box))


def _descriptor(matrix: Tensor, box: tuple[int, int]) -> TensorDescriptor:
    shape = (matrix.shape[0], matrix.shape[1])
    return _kept(matrix.data_ptr(), matrix.dtype, shape, matrix.stride(0), box)


@functools.cache
def _layout(box: tuple[int, int]) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(box), gl.bfloat16)


def _boxes(
    config: Config, block_out: int, block_in: int, transposed: bool
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Tiles of X, of the values and of the output that TMA moves at a time."""
    side = block_in if transposed else block_out
    stored = (config.step, side) if transposed else (side, config.step)
    return (config.tokens, config.step), stored, (config.tokens, side)


def _constants(
    config: Config, block_out: int, block_in: int, transposed: bool, has_bias: bool
) -> dict[str, int | bool]:
    """Compile-time arguments of a launch."""
    side, inner = (block_in, block_out) if transposed else (block_out, block_in)
    return {
        "BT": config.tokens,
        "OUT": side,
        "INNER": inner,
        "STEP": config.step,
        "TRANSPOSED": transposed,
        "HAS_BIAS": has_bias,
        "STAGES": config.stages,
        "WINDOW": config.window,
    }


def _options(config: Config, block_out: int, block_in: int, transposed: bool) -> dict[str, int]:
    """Warps of the consumer, and registers of a thread at launch, before the producer gives its own away.

    So few registers that as many thread blocks as shared memory holds run on a multiprocessor, if a consumer
    still gets its accumulator. ptxas applies the limit at launch to single instructions too: to wgmma.
    """
    side = block_in if transposed else block_out
    ring = 2 * config.stages * config.step * (config.tokens + side)
    threads = 32 * (config.warps + PRODUCER_WARPS)
    for blocks in range(max(1, SHARED_MEMORY_OF_SM // (ring + BESIDE_THE_RING)), 0, -1):
        registers = min(REGISTERS_OF_SM // (threads * blocks) // 8 * 8, ENOUGH_REGISTERS)
        consumer = registers + (registers - PRODUCER_REGISTERS.value) * PRODUCER_WARPS // config.warps
        instruction, accumulator = config.tokens // 2, side * config.tokens // (32 * config.warps)
        if registers >= instruction + SPARE_REGISTERS and consumer >= accumulator + SPARE_REGISTERS:
            break
    return {"num_warps": config.warps, "maxnreg": registers}


def compile_for(
    target: Any,
    dtype: torch.dtype,
    block_out: int,
    block_in: int,
    transposed: bool,
    has_bias: bool,
    config: Config,
) -> Any:
    """The kernel compiled ahead of time, without a GPU.

    Args:
        target: such as `triton.backends.compiler.GPUTarget("cuda", 90, 32)`.
        dtype: torch.bfloat16 or torch.float16, of activations, values and bias.
        block_out, block_in: sides of a block as it is stored.
        transposed: for the input gradient.
        has_bias: whether a bias is added.
        config: tile of the launch, as for `bsr_spmm`.

    Returns:
        Triton's compiled kernel: `asm["ptx"]`, `asm["cubin"]`, `metadata.shared`.
    """
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    maps = [
        f"tensordesc<{name}{list(box)},{_layout(box)!r}>"
        for box in _boxes(config, block_out, block_in, transposed)
    ]
    constants: dict[str, Any] = _constants(config, block_out, block_in, transposed, has_bias)
    signature = dict(zip(("x_map", "values_map", "y_map"), maps, strict=True))
    signature["bias"] = f"*{name}" if has_bias else "constexpr"
    signature["index"] = "*i32"
    signature |= dict.fromkeys(("ptr_at", "idx_at", "slot_at", "order_at", "rows", "token_tiles"), "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    if not has_bias:
        constants["bias"] = None
    source = GluonASTSource(fn=gluon_spmm_kernel, signature=signature, constexprs=constants)
    options = _options(config, block_out, block_in, transposed)
    return triton.compile(source, target=target, options=options)
