"""Which implementation runs: `use_backend(name)`, and the rule behind "auto"."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

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

_HAS_FLAG = hasattr(torch.compiler, "_is_exporting_flag")
_CHOICES = 256  # of "auto" that a topology remembers

_requested: ContextVar[str] = ContextVar("sparse_kernels_backend", default="auto")
_forked = False  # in a forked child the dense library waits for threads that did not come along
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


def select(x: Tensor, topology: Topology, pixels: int = 1) -> str:
    """The implementation for a product of `x` with a weight of this topology.

    Args:
        x: what the product is asked for, in the dtype that it computes in.
        topology: of the weight.
        pixels: of an output image, for a convolution.
    """
    name = requested()
    if name == "auto" and x.is_cpu:  # before `x.device.type`, which costs half a microsecond
        return _on_cpu(x, topology, pixels) if topology.may_be_dense else "cpu"
    device = x.device.type
    if name == "auto":
        if device == "meta":  # only shapes are asked for
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


def exporting() -> bool:
    """`torch.compiler.is_exporting()`, which torch 2.11 takes for true in everything it compiles."""
    return bool(torch.compiler._is_exporting_flag if _HAS_FLAG else torch.compiler.is_exporting())


def _on_cpu(x: Tensor, topology: Topology, pixels: int) -> str:
    """By the model of `cost.py`, asked once for each size of a layer's input."""
    if torch.compiler.is_compiling():  # at trace time; a constant of the graph
        # Nothing may be asked of an input's size that an exported program is to take any of; it holds
        # operators that do not choose.
        return "cpu" if exporting() else _cheaper(*_step(x, topology, pixels))
    key = (x.shape, pixels, x.dtype)
    name = topology.choices.get(key)
    if name is None:
        if len(topology.choices) >= _CHOICES:
            topology.choices.clear()
        name = topology.choices[key] = _cheaper(*_step(x, topology, pixels))
    return "cpu" if _forked else name


def _step(x: Tensor, topology: Topology, pixels: int) -> tuple[Any, ...]:
    """The arguments of `cost.CpuStep`."""
    if len(topology.shape) == 2:
        kind, batch, taken = "linear", x.shape[:-1].numel(), x.shape[-1]
    else:
        kind, batch, taken = "conv2d", x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]
    grid = (topology.rows, topology.cols, topology.n_blocks, topology.block_size)
    return kind, *grid, cost.round_batch(batch), pixels, taken, pixels * topology.shape[0], x.element_size()


def _in_child() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _cheaper(*step: Any) -> str:
    return "dense" if cost.dense_pays(cost.CpuStep(*step)) else "cpu"


# What `torch.compiler.assume_constant_result` does, without its import of the whole compiler.
_cheaper._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
