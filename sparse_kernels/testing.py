"""Helpers for testing sparse products: error rules, topologies of every kind, poisoned memory.

Shipped, so that code built on sparse_kernels can be tested by the same rules as the package itself.
The rules are a kernel's own error bounds, so nothing here is a tolerance to be tuned:

* componentwise: `|y - y*| <= factor * u * (|X| |W|)`, with `y*` and `|X| |W|` computed in float64 and `u`
  the unit roundoff. Holds for any summation order, and catches one wrong entry in a million.
* norm-wise: `||y - y*|| <= rtol * ||y*||`, for whole gradients of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import _ops
from .topology import Topology

#: Dtypes that the CPU kernels compute in; the reduced ones are cast to float32 and back.
NATIVE_DTYPES = (torch.float32, torch.float64)
REDUCED_DTYPES = (torch.bfloat16, torch.float16)

#: What `random_topology` can make.
PATTERNS = (
    "uniform", "skew", "none", "one", "last", "all", "full_row", "full_col",
    "empty_rows", "empty_cols", "first_row_empty", "last_row_empty",
)  # fmt: skip

_FACTOR = {torch.float32: 16 * 2.0**-24, torch.float64: 1e-12}
_RTOL = {torch.float32: 1e-5, torch.float64: 1e-12}


def _check_layout(actual: Tensor, expected: Tensor, name: str) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")


def assert_componentwise(
    actual: Tensor, expected: Tensor, magnitude: Tensor, *, bound: float | None = None, name: str = "result"
) -> None:
    """Check `|actual - expected| <= bound * magnitude` entry by entry.

    Args:
        actual: the result, float32 or float64.
        expected: the same in float64.
        magnitude: the product of the absolute values of the operands, in float64.
        bound: default `16 * 2^-24` for float32 and `1e-12` for float64.
        name: named in the message.

    Raises:
        AssertionError: a wrong shape, or an entry beyond the bound (NaN counts as beyond).
    """
    _check_layout(actual, expected, name)
    if actual.numel() == 0:
        return
    bound = _FACTOR[actual.dtype] if bound is None else bound
    error = (actual.detach().double() - expected).abs()
    bad = ~(error <= bound * magnitude)
    if not bool(bad.any()):
        return
    at = tuple(int(i) for i in bad.nonzero()[0])
    raise AssertionError(
        f"{name}: {int(bad.sum())} of {bad.numel()} entries beyond {bound:.2e} * |X||W|; first at {at}: got "
        f"{actual[at].item():.9g}, expected {expected[at].item():.9g}, |X||W| = {magnitude[at].item():.3g}"
    )


def assert_normwise(
    actual: Tensor, expected: Tensor, *, rtol: float | None = None, name: str = "result"
) -> None:
    """Check `||actual - expected|| <= rtol * ||expected||` in the 2-norm (default 1e-5 / 1e-12 by dtype).

    Raises:
        AssertionError: a wrong shape, or a larger error (NaN counts as larger).
    """
    _check_layout(actual, expected, name)
    if actual.numel() == 0:
        return
    rtol = _RTOL[actual.dtype] if rtol is None else rtol
    expected = expected.detach().double()
    error, size = (actual.detach().double() - expected).norm().item(), expected.norm().item()
    if not error <= rtol * size:
        raise AssertionError(
            f"{name}: ||error|| = {error:.3e} exceeds {rtol:.1e} * {size:.3e} "
            f"(ratio {error / max(size, 1e-300):.2e})"
        )


def assert_same_nonfinite(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Check that NaN, +inf and -inf stand in exactly the same entries.

    Raises:
        AssertionError: naming the first entry that differs.
    """
    _check_layout(actual, expected, name)
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = test(actual) != test(expected)
        if bool(differs.any()):
            at = tuple(int(i) for i in differs.nonzero()[0])
            raise AssertionError(
                f"{name}: {kind} pattern differs in {int(differs.sum())} entries; first at {at}: "
                f"got {actual[at].item()}, expected {expected[at].item()}"
            )


def random_topology(
    shape: tuple[int, ...],
    pattern: str = "uniform",
    density: float = 0.1,
    block_size: int | tuple[int, int] = 1,
    groups: int = 1,
    generator: torch.Generator | None = None,
) -> Topology:
    """A topology of one of `PATTERNS` over the block grid of a weight.

    Args:
        shape, block_size, groups: as for `Topology`.
        pattern: `"uniform"` (exact count), `"skew"` (row counts over two orders of magnitude), `"none"`,
            `"one"` (one random entry), `"last"` (only the last), `"all"`, `"full_row"` / `"full_col"`
            (one complete row or column and nothing else), `"empty_rows"` / `"empty_cols"` (a third of
            them empty), `"first_row_empty"`, `"last_row_empty"`.
        density: of the non-empty part.
        generator: source of randomness.

    Raises:
        ValueError: an unknown pattern.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}")
    if pattern == "uniform":
        return Topology.random(shape, density, block_size, groups, generator)
    blank = Topology(torch.empty(0, dtype=torch.int64), shape, block_size, groups)
    rows, cols = blank.rows, blank.cols
    grid = torch.zeros(rows, cols, dtype=torch.bool)
    if grid.numel() and pattern == "all":
        grid[:] = True
    elif grid.numel() and pattern == "last":
        grid[-1, -1] = True
    elif grid.numel() and pattern in ("one", "full_row", "full_col"):
        row, col = (int(torch.randint(n, (), generator=generator)) for n in (rows, cols))
        grid[slice(None) if pattern == "full_col" else row, slice(None) if pattern == "full_row" else col] = (
            True
        )
    elif grid.numel() and pattern != "none":
        chance = torch.full((rows, 1), density)
        if pattern == "skew":
            chance = (density * (1.5 * torch.randn(rows, 1, generator=generator)).exp()).clamp(max=1)
        grid = torch.rand(rows, cols, generator=generator) < chance
        if pattern == "empty_rows":
            grid[torch.rand(rows, generator=generator) < 1 / 3] = False
        elif pattern == "empty_cols":
            grid[:, torch.rand(cols, generator=generator) < 1 / 3] = False
        elif pattern == "first_row_empty":
            grid[0] = False
        elif pattern == "last_row_empty":
            grid[-1] = False
    return Topology(grid.flatten().nonzero().flatten(), shape, block_size, groups)


def guarded(tensor: Tensor, margin: int = 64) -> tuple[Tensor, Callable[[], bool]]:
    """A contiguous copy of `tensor` between canaries, and a function that says whether they are intact.

    The canaries are NaN (or a large negative integer), so that a read outside the tensor shows too.
    """
    canary = float("nan") if tensor.is_floating_point() else -(2**30) - 7
    size = tensor.numel()
    buffer = torch.full((size + 2 * margin,), canary, dtype=tensor.dtype)
    inner = buffer[margin : margin + size].view(tensor.shape)
    inner.copy_(tensor)
    fresh = buffer.clone()

    def intact() -> bool:
        now, then = (torch.cat([b[:margin], b[margin + size :]]).view(torch.uint8) for b in (buffer, fresh))
        return torch.equal(now, then)

    return inner, intact


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every freshly allocated tensor with NaN (or the largest integer) inside the `with` block."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    _ops.poison_outputs(True)
    try:
        yield
    finally:
        _ops.poison_outputs(False)
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
