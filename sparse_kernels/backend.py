"""Which implementation runs: `use_backend(name)`, and the rule behind "auto"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .topology import Topology

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda", "dense")

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
        return "cpu" if device in ("cpu", "meta") else "reference"  # on meta only shapes are asked for
    if name in ("triton", "cuda"):
        raise RuntimeError(
            f'backend "{name}" cannot run: this release has no {name} kernels; '
            'use "auto", "reference" or "dense"'
        )
    if name == "cpu" and device != "cpu":
        raise RuntimeError(f'backend "cpu" cannot run on a {device} tensor; use "auto" or move it to the CPU')
    return name
