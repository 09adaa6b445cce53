"""The operators as Python functions, and their shapes for the compiler.

Schemas are in `csrc/registration.cpp`; contracts in `functional.py`. Imports torch only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from . import (
    _load,  # noqa: F401  (registers the operators)
    dense,
)
from .backend import has_triton
from .dense import is_channels_last

_lib = torch.ops.sparse_kernels

index_build = _lib.index_build.default
index_update = _lib.index_update.default
linear = _lib.linear.default
linear_forward = _lib.linear_forward.default
linear_backward = _lib.linear_backward.default
conv2d = _lib.conv2d.default
conv2d_forward = _lib.conv2d_forward.default
conv2d_backward = _lib.conv2d_backward.default
dense_linear_forward = _lib.dense_linear_forward.default
dense_linear_backward = _lib.dense_linear_backward.default
triton_linear_forward = _lib.triton_linear_forward.default
triton_linear_backward = _lib.triton_linear_backward.default
dense_conv2d_forward = _lib.dense_conv2d_forward.default
dense_conv2d_backward = _lib.dense_conv2d_backward.default
growth_norms = _lib.growth_norms.default
observe = _lib.observe.default
growth_screen = _lib.growth_screen.default
growth_state = _lib.growth_state.default
growth_scan = _lib.growth_scan.default
poison_outputs = _lib.poison_outputs.default
growth_best = _lib.growth_best.default
weakest = _lib.weakest.default
exchange = _lib.exchange.default
reordered = _lib.reordered.default
all_finite = _lib.all_finite.default
cpu_isa = _lib.cpu_isa.default
cpu_fma_peak = _lib.cpu_fma_peak.default


def out_features(values: Tensor, rows: int) -> int:
    """Rows of blocks -> rows of weights."""
    return rows if values.dim() == 1 else rows * values.shape[1]


def conv2d_output_size(
    size: tuple[int, int],
    kernel: list[int] | tuple[int, ...],
    stride: list[int] | tuple[int, ...],
    padding: list[int] | tuple[int, ...],
    dilation: list[int] | tuple[int, ...],
) -> tuple[int, int]:
    """Output height and width of a convolution."""
    h, w = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return h, w


def _empty_image(like: Tensor, size: tuple[int, int, int, int]) -> Tensor:
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


@register_fake("sparse_kernels::linear")
@register_fake("sparse_kernels::linear_forward")
@register_fake("sparse_kernels::dense_linear_forward")
@register_fake("sparse_kernels::triton_linear_forward")
def _(x, values, bias, index, rows, cols):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], out_features(values, rows))


@register_fake("sparse_kernels::linear_backward")
@register_fake("sparse_kernels::dense_linear_backward")
@register_fake("sparse_kernels::triton_linear_backward")
def _(dy, x, values, index, rows, cols, values_size, need_bias):  # type: ignore[no-untyped-def]
    inputs = cols if len(values_size) == 1 else cols * values_size[2]
    return (
        dy.new_empty((dy.shape[0], inputs) if values is not None else 0),
        dy.new_empty(values_size if x is not None else 0),
        dy.new_empty(dy.shape[1] if need_bias else 0),
    )


@register_fake("sparse_kernels::conv2d")
@register_fake("sparse_kernels::conv2d_forward")
@register_fake("sparse_kernels::dense_conv2d_forward")
def _(x, values, bias, index, rows, cols, kernel, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    h, w = conv2d_output_size(x.shape[2:], kernel, stride, padding, dilation)
    return _empty_image(x, (x.shape[0], out_features(values, rows), h, w))


@register_fake("sparse_kernels::conv2d_backward")
@register_fake("sparse_kernels::dense_conv2d_backward")
def _(dy, x, values, index, rows, cols, kernel, stride, padding, dilation, groups, *need):  # type: ignore[no-untyped-def]
    need_x, need_values, need_bias = need
    return (
        _empty_image(x, tuple(x.shape)) if need_x else x.new_empty(0),
        values.new_empty(values.shape if need_values else 0),
        dy.new_empty(dy.shape[1] if need_bias else 0),
    )


@register_fake("sparse_kernels::observe")
def _(ticket, x, dy, conf, exact):  # type: ignore[no-untyped-def]
    pass


@register_fake("sparse_kernels::growth_norms")
def _(x, dy, b_out, b_in, score):  # type: ignore[no-untyped-def]
    return x.new_empty(dy.shape[1] // b_out, x.shape[1] // b_in, dtype=torch.float32)


# implementations in Python ----------------------------------------------------------------------


def _by_triton(name: str) -> Callable[..., Any]:
    """A function of `triton/operators.py`. Triton is imported when the first one is called."""
    found: Callable[..., Any] | None = None

    def run(*args: Any) -> Any:
        nonlocal found
        if found is None:
            found = getattr(importlib.import_module("sparse_kernels.triton.operators"), name)
        return found(*args)

    return run


def _implement(operator: str, key: str, function: Callable[..., Any]) -> None:
    torch.library.impl(f"sparse_kernels::{operator}", key)(function)


for _name in ("linear_forward", "linear_backward", "conv2d_forward", "conv2d_backward"):
    _implement(f"dense_{_name}", "CompositeExplicitAutograd", getattr(dense, f"dense_{_name}"))
# On CUDA tensors the operators without a prefix are what exported programs and growth scorers call.
_gpu: dict[str, Callable[..., Any]] = {
    "linear_forward": dense.dense_linear_forward,
    "linear_backward": dense.dense_linear_backward,
    "growth_norms": dense.growth_norms,
}
if has_triton("cuda"):
    _gpu = {_name: _by_triton(_name) for _name in _gpu}
_gpu |= {
    "linear": _gpu["linear_forward"],
    "conv2d": dense.dense_conv2d_forward,
    "conv2d_forward": dense.dense_conv2d_forward,
    "conv2d_backward": dense.dense_conv2d_backward,
}
for _name, _function in _gpu.items():
    _implement(_name, "CUDA", _function)
for _name in ("linear_forward", "linear_backward"):
    _implement(f"triton_{_name}", "CompositeExplicitAutograd", _by_triton(_name))
_implement("growth_norms", "CompositeExplicitAutograd", dense.growth_norms)
