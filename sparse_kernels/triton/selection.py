"""The k smallest of many scores, exactly and without a sort: equal ones by place, the lowest first.

Scores become integers in the same order (`key_of`). A cut is two numbers: the k-th smallest key, and the
place of the last that is taken at it. One program finds it by counting digits: one launch, and no memory but
the keys.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, aligned

SMALL = 4096
NEVER = tl.constexpr(2**31 - 1)  # a key that no score has


@triton.jit
def key_of(score):
    """int32 in the order of float32 scores: -0 is 0, and NaN is the largest."""
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(score == 0, 0, bits)
    bits = tl.where(score != score, 0x7FC00000, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def before_cut(key, place, cut):
    """Whether a key is among the k smallest."""
    last = tl.load(cut)
    return (key < last) | ((key == last) & (place <= tl.load(cut + 1)))


@triton.jit
def _biased(keys, place, size):
    """Keys whose order is that of their bits."""
    return tl.load(keys + place, place < size, 0) ^ -2147483648


@triton.jit
def _next_digit(keys, size, key, left, SHIFT: tl.constexpr, TILE: tl.constexpr):
    """Five more bits of the key that is wanted: the `left`-th among those that agree with `key` so far.

    Returns the key, which it is among those that agree now, and how many they are.
    """
    LARGEST: tl.constexpr = 3 if SHIFT == 30 else 31
    KNOWN: tl.constexpr = 0 if SHIFT == 30 else -(2 ** (SHIFT + 5))
    lane = tl.arange(0, TILE)
    counts = tl.zeros((32,), tl.int32)
    for first in range(0, size, TILE):
        biased = _biased(keys, first + lane, size)
        agrees = (first + lane < size) & (((biased ^ key) & KNOWN) == 0)
        counts += tl.histogram((biased >> SHIFT) & LARGEST, 32, mask=agrees)
    below = tl.cumsum(counts, 0) < left
    digit = tl.sum(below.to(tl.int32))
    ties = tl.sum(tl.where(tl.arange(0, 32) == digit, counts, 0))
    return key | (digit << SHIFT), left - tl.sum(tl.where(below, counts, 0)), ties


@triton.jit(do_not_specialize=["keys_at", "cut_at", "size", "k", "most"])
def cut_kernel(work, keys_at, cut_at, size, k, most, K_ON_DEVICE: tl.constexpr, TILE: tl.constexpr):
    """One program: write the cut of the k smallest among `size` keys.

    `k` is a number, or where one is on the device; it is held to `[0, most]`, whatever it says.
    """
    keys = work + keys_at
    wanted = tl.load(k).to(tl.int32) if K_ON_DEVICE else k
    wanted = tl.minimum(tl.maximum(wanted, 0), most)
    key, left, ties = _next_digit(keys, size, 0, wanted, 30, TILE)
    for step in tl.static_range(6):
        key, left, ties = _next_digit(keys, size, key, left, 25 - 5 * step, TILE)
    if wanted == 0:
        tl.store(work + cut_at, -2147483648)
        tl.store(work + cut_at + 1, -1)
    else:
        tl.store(work + cut_at, key ^ -2147483648)
        if left == ties:
            tl.store(work + cut_at + 1, size)
        else:
            lane = tl.arange(0, TILE)
            passed, found = 0, -1
            for first in range(0, size, TILE):
                tied = (first + lane < size) & (_biased(keys, first + lane, size) == key)
                nth = passed + tl.cumsum(tied.to(tl.int32), 0)
                found = tl.maximum(found, tl.max(tl.where(tied & (nth == left), first + lane, -1)))
                passed += tl.sum(tied.to(tl.int32))
            tl.store(work + cut_at + 1, found)


def launch(work: Tensor, keys_at: int, cut_at: int, size: int, k: int | Tensor, most: int) -> None:
    """Write the cut of the k smallest of `size` keys in `work` to two places of it.

    Args:
        work: int32, on the current device.
        k: int, or 0-d integer tensor on the device; held to `[0, most]`.
    """
    on_device = isinstance(k, Tensor)
    dtype = k.dtype if isinstance(k, Tensor) else None
    k = aligned(k) if isinstance(k, Tensor) else k
    run = _launch(size <= SMALL, on_device, dtype, work.device.index)
    run((1, 1, 1), work, keys_at, cut_at, size, k, most)


@functools.lru_cache(maxsize=256)
def _launch(small: bool, on_device: bool, dtype: torch.dtype | None, device: int | None) -> Launch:
    return Launch(cut_kernel, constants(small, on_device))


def constants(small: bool, on_device: bool) -> dict[str, int | bool]:
    """Compile-time arguments and options: of a cut among few keys, and of a k on the device."""
    return {"K_ON_DEVICE": on_device, "TILE": SMALL if small else 2 * SMALL, "num_warps": 16, "num_stages": 1}
