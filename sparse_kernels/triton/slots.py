"""What a topology update reads and writes of the values of blocks, all tensors of a kind in one launch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, aligned, on_its_device

TENSORS = 4  # cleared by one launch
PROGRAMS = 1024  # that clear, at most
CLEAR = {"LANES": 512, "num_warps": 4, "num_stages": 1}


@triton.jit
def survey_kernel(
    values, gradient, scores, finite, SIZE: tl.constexpr, LANES: tl.constexpr, SQUARES: tl.constexpr
):
    """One program a block: its norm; whether that is finite, and whether its gradient is."""
    block = tl.program_id(0).to(tl.int64)
    norm = tl.zeros((LANES,), tl.float32)
    bad = tl.zeros((LANES,), tl.int32)
    for first in range(0, SIZE, LANES):
        at = first + tl.arange(0, LANES)
        v = tl.load(values + block * SIZE + at, at < SIZE, 0.0).to(tl.float32)
        g = tl.load(gradient + block * SIZE + at, at < SIZE, 0.0).to(tl.float32)
        norm += v * v if SQUARES else tl.abs(v)
        bad |= (tl.abs(g) < float("inf")).to(tl.int32) ^ 1
    score = tl.sum(norm)
    if SQUARES:
        score = tl.sqrt_rn(score)
    tl.store(scores + block, score)
    tl.store(finite + block, tl.max(bad) == 0)
    tl.store(finite + tl.num_programs(0) + block, tl.abs(score) < float("inf"))


@triton.jit(do_not_specialize=["a_size", "b_size", "c_size", "d_size"])
def clear_kernel(slots, count, a, b, c, d, a_size, b_size, c_size, d_size, LANES: tl.constexpr):
    """Zero the first `count` of `slots` in four int32 tensors, each of its own size a slot."""
    for i in range(tl.program_id(0), tl.load(count).to(tl.int32), tl.num_programs(0)):
        slot = tl.load(slots + i).to(tl.int64)
        _clear(a, slot, a_size, LANES)
        _clear(b, slot, b_size, LANES)
        _clear(c, slot, c_size, LANES)
        _clear(d, slot, d_size, LANES)


@triton.jit
def _clear(tensor, slot, size, LANES: tl.constexpr):
    for first in range(0, size, LANES):
        at = first + tl.arange(0, LANES)
        tl.store(tensor + slot * size + at, 0, at < size)


@on_its_device
def survey(values: Tensor, gradient: Tensor, score: str) -> tuple[Tensor, Tensor]:
    """Norms of blocks, and whether all is finite, in two launches.

    Args:
        values: `[n, b_out, b_in]`, contiguous, bfloat16, float16 or float32.
        gradient: of the same shape, likewise.
        score: `"l1"` (sum of absolute values) or `"l2"`.

    Returns:
        scores: `[n]` float32.
        finite: `[2]` bool: whether the gradient is, whether the scores are.
    """
    n = values.shape[0]
    scores = torch.empty(n, dtype=torch.float32, device=values.device)
    finite = torch.empty(2, n, dtype=torch.bool, device=values.device)
    size = values[0].numel()
    run = _survey(size, score, values.dtype, gradient.dtype, values.device.index)
    run((n, 1, 1), aligned(values), aligned(gradient), scores, finite)
    return scores, finite.all(1)


@functools.lru_cache(maxsize=1024)
def _survey(
    size: int, score: str, dtype: torch.dtype, gradient_dtype: torch.dtype, device: int | None
) -> Launch:
    return Launch(survey_kernel, survey_constants(size, score))


def survey_constants(size: int, score: str) -> dict[str, int | bool]:
    """Compile-time arguments and options for blocks of `size` weights."""
    lanes = min(triton.next_power_of_2(size), 2048)
    return {"SIZE": size, "LANES": lanes, "SQUARES": score == "l2", "num_warps": 4, "num_stages": 1}


@on_its_device
def clear_(slots: Tensor, count: Tensor, words: Sequence[Tensor]) -> None:
    """Zero the first `count` of `slots` in up to `TENSORS` tensors of 32-bit words.

    Args:
        slots: `[n]` int32, distinct.
        count: 0-d int64, at most n.
        words: flat int32, contiguous, starting on 16 bytes, n times as long as an entry each.
    """
    n = slots.numel()
    filled = [*words, *[words[0]] * (TENSORS - len(words))]
    sizes = [t.numel() // n for t in words] + [0] * (TENSORS - len(words))
    _clearing(slots.device.index)((min(n, PROGRAMS), 1, 1), slots, count, *filled, *sizes)


@functools.lru_cache(maxsize=64)
def _clearing(device: int | None) -> Launch:
    return Launch(clear_kernel, CLEAR)
