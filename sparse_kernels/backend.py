"""Which implementation runs: `use_backend(name)`, and the rule behind "auto"."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import cost

if TYPE_CHECKING:
    from .topology import Topology

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda", "dense")

TRITON_BLOCKS = (16, 32, 64, 128)  # sides of the blocks that the Triton kernels take
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton kernels run on CPU tensors, in Python
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_ARITHMETIC = {torch.bfloat16: "half", torch.float16: "half", torch.float32: "ieee"}

_requested: ContextVar[str] = ContextVar("sparse_kernels_backend", default="auto")
_latest = "auto"  # the same for compiled code: Dynamo cannot trace a ContextVar, but guards on a global


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run sparse products with one implementation inside the `with` block (this thread or task).

    Args:
        name: `"auto"` (the fastest for shape, density and block size), `"reference"` (plain torch, the
            oracle), `"cpu"`, `"triton"`, `"cuda"`, or `"dense"` (scatter into a dense scratch and call
            the dense library).

    Raises:
        ValueError: an unknown name.
        RuntimeError: raised by the product, if that implementation cannot run on its tensors.

    Notes:
        Code compiled by `torch.compile` follows the latest `use_backend` of any thread.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    global _latest
    token = _requested.set(name)
    _latest = name
    try:
        yield
    finally:
        _requested.reset(token)
        _latest = _requested.get()


def requested() -> str:
    """The name in force here."""
    return _latest if torch.compiler.is_compiling() else _requested.get()


def select(x: Tensor, topology: Topology) -> str:
    """The implementation for a product of `x` with a weight of this topology."""
    name = requested()
    device = x.device.type
    if name == "auto":
        if device in ("cpu", "meta"):  # on meta only shapes are asked for
            return "cpu"
        return "triton" if device == "cuda" and _blocks_pay(x.dtype, topology) else "dense"
    if name == "cuda":
        raise RuntimeError(
            'backend "cuda" cannot run: this release has no CUDA C++ kernels; use "auto", "triton" or "dense"'
        )
    if name == "triton" and (reason := why_not_triton(device, x.dtype, topology)):
        raise RuntimeError(f'backend "triton" cannot run: {reason}; use "auto" or "dense"')
    if name == "cpu" and device != "cpu":
        raise RuntimeError(f'backend "cpu" cannot run on a {device} tensor; use "auto" or move it to the CPU')
    return name


def has_triton(device: str) -> bool:
    """Whether Triton kernels run on tensors of this type of device."""
    return _HAS_TRITON and (device == "cuda" or (device == "cpu" and INTERPRETED))


def why_not_triton(device: str, dtype: torch.dtype, topology: Topology) -> str:
    """Why the Triton kernels cannot multiply here; empty if they can."""
    if not _HAS_TRITON:
        return "Triton is not installed (a CUDA build of torch brings it)"
    if not has_triton(device):
        return f"it needs a CUDA tensor, not a {device} one (or TRITON_INTERPRET=1, to try it slowly)"
    if len(topology.shape) != 2:
        return "it has kernels for Linear, not for convolutions"
    if not set(topology.block_size) <= set(TRITON_BLOCKS):
        sides = ", ".join(map(str, TRITON_BLOCKS))
        return f"it has kernels for blocks with sides of {sides}, not {topology.block_size}"
    if dtype not in _ARITHMETIC:
        return f"it has kernels for bfloat16, float16 and float32, not {dtype}"
    return ""


def _blocks_pay(dtype: torch.dtype, topology: Topology) -> bool:
    if why_not_triton("cuda", dtype, topology):
        return False
    arithmetic = _ARITHMETIC[dtype]
    if arithmetic == "ieee" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        arithmetic = "tf32"
    grid = (topology.rows, topology.cols, topology.n_blocks)
    return cost.blocks_pay(*grid, topology.block_size, arithmetic)
