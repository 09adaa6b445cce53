"""The operators as Python functions, and their shapes for the compiler.

Schemas are in `csrc/registration.cpp`; contracts in `functional.py`. Imports torch only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import register_fake

from . import _load  # noqa: F401  (registers the operators)

_lib = torch.ops.sparse_kernels

index_build = _lib.index_build.default
index_update = _lib.index_update.default
linear_forward = _lib.linear_forward.default
linear_backward = _lib.linear_backward.default
conv2d_forward = _lib.conv2d_forward.default
conv2d_backward = _lib.conv2d_backward.default
growth_scan = _lib.growth_scan.default
cpu_isa = _lib.cpu_isa.default


def out_features(values: Tensor, rows: int) -> int:
    """Rows of blocks -> rows of weights."""
    return rows if values.dim() == 1 else rows * values.shape[1]


def is_channels_last(x: Tensor) -> bool:
    """Whether a 4-D tensor's memory is NHWC and not NCHW (ambiguous sizes count as NCHW)."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


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
    n, c, h, w = size
    if is_channels_last(like):
        return like.new_empty(n, h, w, c).permute(0, 3, 1, 2)
    return like.new_empty(size)


@register_fake("sparse_kernels::linear_forward")
def _(x, values, bias, index, rows, cols):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], out_features(values, rows))


@register_fake("sparse_kernels::linear_backward")
def _(dy, x, values, index, rows, cols, need_x, need_values, need_bias):  # type: ignore[no-untyped-def]
    return (
        x.new_empty(x.shape if need_x else 0),
        values.new_empty(values.shape if need_values else 0),
        dy.new_empty(dy.shape[1] if need_bias else 0),
    )


@register_fake("sparse_kernels::conv2d_forward")
def _(x, values, bias, index, rows, cols, kernel, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    h, w = conv2d_output_size(x.shape[2:], kernel, stride, padding, dilation)
    return _empty_image(x, (x.shape[0], out_features(values, rows), h, w))


@register_fake("sparse_kernels::conv2d_backward")
def _(dy, x, values, index, rows, cols, kernel, stride, padding, dilation, groups, *need):  # type: ignore[no-untyped-def]
    need_x, need_values, need_bias = need
    return (
        _empty_image(x, tuple(x.shape)) if need_x else x.new_empty(0),
        values.new_empty(values.shape if need_values else 0),
        dy.new_empty(dy.shape[1] if need_bias else 0),
    )
