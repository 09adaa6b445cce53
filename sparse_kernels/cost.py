"""When block-sparse kernels on a GPU are faster than the dense library: a model, not a measurement.

A product takes the longest of these times: multiply-adds on the tensor cores, as fast as their operands come
out of shared memory; bytes from L2 into it, which bounds gathering; compulsory bytes from memory.
The numbers are an H200's; what counts is the ratio to the dense library, nearly the same for any number of
tokens and on an H100. `python -m bench.gpu` prints measured break-even points.
"""

from __future__ import annotations

import functools

_TOKENS = 8192  # of the comparison
_TILE = 256  # tokens of a program
_L2, _MEMORY = 7.5e12, 4.3e12  # bytes a second
_FIXED = 3e-6  # seconds: filling the pipeline, tail, launch
_LOSS = 1.12
#: Multiply-adds and additions a second of the dense library, and of ours at best, by arithmetic.
_RATES = {"half": (790e12, 790e12), "tf32": (400e12, 400e12), "ieee": (47e12, 23e12)}


@functools.lru_cache(maxsize=4096)
def blocks_pay(rows: int, cols: int, n_blocks: int, block_size: tuple[int, int], arithmetic: str) -> bool:
    """Whether a training step (Y, dX and dW) is faster with block-sparse kernels than with dense ones.

    Args:
        rows, cols: the block grid.
        n_blocks: active blocks.
        block_size: `(b_out, b_in)`.
        arithmetic: "half" (bfloat16 and float16), "tf32" or "ieee" (float32).
    """
    return sparse_step(rows, cols, n_blocks, block_size, arithmetic) < dense_step(
        rows, cols, block_size, arithmetic
    )


def sparse_step(rows: int, cols: int, n_blocks: int, block_size: tuple[int, int], arithmetic: str) -> float:
    """Seconds of the three products with active blocks only."""
    b_out, b_in = block_size
    rate, size = _RATES[arithmetic][1], 2 if arithmetic == "half" else 4
    out, inner, weight = rows * b_out, cols * b_in, n_blocks * b_out * b_in
    work = 2 * _TOKENS * weight

    def spmm(side: int, depth: int) -> float:
        per_tile = n_blocks * (_TILE * depth + side * depth) * size
        moved = per_tile * _TOKENS / _TILE + _TOKENS * out * size
        return max(work / (rate * _tensor_core_share(_TILE if side >= 64 else side)), moved / _L2)

    together = max(1, 256 // b_in)
    sddmm = max(work / rate, n_blocks * _TOKENS * (b_in + b_out / together) * size / _L2)
    memory = _memory(out, inner, weight, size)
    return sum(_LOSS * max(t, memory) + _FIXED for t in (spmm(b_out, b_in), spmm(b_in, b_out), sddmm))


def dense_step(rows: int, cols: int, block_size: tuple[int, int], arithmetic: str) -> float:
    """Seconds of the three products of the dense library."""
    out, inner = rows * block_size[0], cols * block_size[1]
    size = 2 if arithmetic == "half" else 4
    work = 2 * _TOKENS * out * inner
    return 3 * (max(work / _RATES[arithmetic][0], _memory(out, inner, out * inner, size)) + _FIXED)


def _memory(out: int, inner: int, weight: int, size: int) -> float:
    return (_TOKENS * (out + inner) + weight) * size / _MEMORY


def _tensor_core_share(n: int) -> float:
    """Share of the peak that wgmma m64nNk16 reaches when both operands come from shared memory.

    It reads 2 KiB and 32 N bytes at 128 bytes a clock, and multiplies for N / 2 clocks.
    """
    return min(1.0, (n / 2) / ((2048 + 32 * n) / 128))
