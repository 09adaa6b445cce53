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
linear = _lib.linear.default
linear_forward = _lib.linear_forward.default
linear_backward = _lib.linear_backward.default
conv2d = _lib.conv2d.default
conv2d_forward = _lib.conv2d_forward.default
conv2d_backward = _lib.conv2d_backward.default
observe = _lib.observe.default
growth_scan = _lib.growth_scan.default
cpu_isa = _lib.cpu_isa.default


def out_features(values: Tensor, rows: int) -> int:
    """Rows of blocks -> rows of weights."""
    return rows if values.dim() == 1 else rows * values.shape[1]


def is_channels_last(x: Tensor) -> bool:
    """Whether a 4-D tensor's memory is NHWC and not NCHW.

    One that is both, for having one channel or pixel, is what its strides look like: the rule of torch's
    convolutions, so that layers agree on the format of their output.
    """
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False
    if not x.is_contiguous():
        return True
    least = 0
    for d in (1, 3, 2, 0):
        size, stride = x.shape[d], x.stride(d)
        if size == 0 or stride < least or (d == 0 and least == x.stride(1)):
            return False
        least = stride * size
    return True


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
def _(x, values, bias, index, rows, cols):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], out_features(values, rows))


@register_fake("sparse_kernels::linear_backward")
def _(dy, x, values, index, rows, cols, values_size, need_bias):  # type: ignore[no-untyped-def]
    inputs = cols if len(values_size) == 1 else cols * values_size[2]
    return (
        dy.new_empty((dy.shape[0], inputs) if values is not None else 0),
        dy.new_empty(values_size if x is not None else 0),
        dy.new_empty(dy.shape[1] if need_bias else 0),
    )


@register_fake("sparse_kernels::conv2d")
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


@register_fake("sparse_kernels::observe")
def _(ticket, x, dy, conf, exact):  # type: ignore[no-untyped-def]
    pass
