"""When sparse kernels are faster than the dense library: models, not measurements.

On a GPU, for block-sparse kernels: a product takes the longest of these times: multiply-adds on the tensor
cores, as fast as their operands come out of shared memory; bytes from L2 into it, which bounds gathering;
compulsory bytes from memory. The numbers are an H200's; what counts is the ratio to the dense library, nearly
the same for any number of tokens and on an H100. `python -m bench.gpu` prints measured break-even points.

On a CPU, for all kernels: the parts of a training step are added up, each at a price of its own. The prices
are one thread's: the choice, and so the bits of a result, shall not depend on the number of threads.
`python -m bench.auto` measures whether the cheaper one is chosen, and with `--fit` the prices.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

# on a GPU -------------------------------------------------------------------------------------

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


# on a CPU -------------------------------------------------------------------------------------

#: Below these densities the dense library never pays: nothing is asked, nothing of the dense size allocated.
SURELY_SPARSE = {"linear": 0.25, "conv2d": 0.2}

#: Batches that are told apart, so that code compiled for any batch is compiled a few times at most.
BATCHES = (1, 8, 16, 32, 64, 256, 1024)

#: Nanoseconds of one thread, by kind of layer and what computes it: for a step, and for each unit of the
#: features that `CpuStep` computes. Fitted on an Intel Xeon (Emerald Rapids, AVX-512).
PRICES: dict[tuple[str, str], tuple[float, ...]] = {
    ("linear", "csr"): (67100.0, 2.58, 1.27, 0.641, 19.8),
    ("linear", "bsr"): (68200.0, 2.53, 2.48, 0.656, 23.3),
    ("linear", "strips"): (65600.0, 0.243, 0.0, 0.815, 8.3),
    ("linear", "dense"): (145000.0, 1.93, 1.22, 0.0431, 0.881),
    ("conv2d", "csr"): (126000.0, 15.6, 0.0, 0.877, 31.2),
    ("conv2d", "bsr"): (120000.0, 6.54, 0.0, 0.762, 27.7),
    ("conv2d", "dense"): (285000.0, 2.75, 4.42, 0.0303, 6.94),
}

_VECTOR = 64  # bytes: a cell of tokens or images, what the kernels compute with


class CpuStep(NamedTuple):
    """A training step of one layer (output, input gradient, weight gradient), as the model sees it.

    Attributes:
        kind: "linear" or "conv2d".
        rows, cols: the block grid.
        n_blocks: active blocks.
        block_size: `(b_out, b_in)`.
        batch: tokens or images.
        pixels: of an output image; 1 for a Linear.
        taken, given: elements of an input and an output, for one token or image.
        element: bytes of one. What is smaller than float32 is computed in it.
    """

    kind: str
    rows: int
    cols: int
    n_blocks: int
    block_size: tuple[int, int]
    batch: int
    pixels: int
    taken: int
    given: int
    element: int

    @property
    def format(self) -> str:
        """Of the weight; blocks of whole vectors have kernels of their own (csrc/cpu/linear_bsr.h)."""
        if self.block_size == (1, 1):
            return "csr"
        whole = all(side * max(4, self.element) % _VECTOR == 0 for side in self.block_size)
        return "strips" if whole and self.kind == "linear" else "bsr"

    def sparse_features(self) -> tuple[float, ...]:
        """One; weights; blocks, and weights, times vectors of the batch; vectors of inputs and outputs."""
        lanes = _VECTOR // max(4, self.element)
        vectors = -(-self.batch * self.pixels // lanes)
        nnz = self.n_blocks * self.block_size[0] * self.block_size[1]
        # Up to 4 vectors are computed at a time, with one look at the weight's place.
        looks = -(-vectors // 4) * self.n_blocks
        moved = -(-self.batch // lanes) if self.pixels == 1 else self.batch / lanes
        return 1.0, nnz, looks, vectors * nnz, moved * (self.taken + self.given)

    def dense_features(self) -> tuple[float, ...]:
        """One; active and all weights; all weights times the batch; elements of inputs and outputs."""
        block = self.block_size[0] * self.block_size[1]
        size, scale = self.rows * self.cols * block, max(4, self.element) / 4
        batch = self.batch * scale
        moved = batch * (self.taken + self.given)
        # The values of a full CSR weight are the dense weight: none is scattered.
        active = 0 if block == 1 and self.n_blocks == size else self.n_blocks * block
        return 1.0, active, size * scale, batch * self.pixels * size, moved

    def seconds(self, implementation: str) -> float:
        """Of "sparse" kernels, or the "dense" library with its scatter and sampling."""
        sparse = implementation == "sparse"
        features = self.sparse_features() if sparse else self.dense_features()
        prices = PRICES[self.kind, self.format if sparse else "dense"]
        return 1e-9 * sum(f * price for f, price in zip(features, prices, strict=True))


def round_batch(batch: int) -> int:
    """Up to the next of `BATCHES`, or down to the last."""
    for size in BATCHES:
        if batch <= size:
            return size
    return BATCHES[-1]


def may_pay(kind: str, rows: int, cols: int, n_blocks: int) -> bool:
    """Whether `dense_pays` can be true of a weight, for any batch."""
    return n_blocks >= SURELY_SPARSE[kind] * rows * cols


def dense_pays(step: CpuStep) -> bool:
    """Whether a training step on a CPU is faster through the dense library."""
    possible = may_pay(step.kind, step.rows, step.cols, step.n_blocks)
    return possible and step.seconds("dense") < step.seconds("sparse")
