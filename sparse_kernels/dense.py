"""The "dense" backend: the weight scattered into a dense scratch, the dense library's products.

Worth it at high density, and on a GPU for single weights, which tensor cores cannot skip. Values, gradients
and optimizer state still take O(nnz): the scratch lives for one product, and the gradient of the values is
sampled from stripes of the dense one, so that no gradient of the dense size is kept. These operators have the
schemas of the sparse ones. Of a CSR weight with all positions active, the values are the dense weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _load, layout  # noqa: F401  (_load registers the operators)
from .backend import has_triton

_Ints = list[int]
_Grads = tuple[Tensor, Tensor, Tensor]

# Of the dense gradient held at a time: 4 MiB in float32 on a CPU; a GPU needs more to be busy.
_STRIPE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 23}

_scatter_on_cpu = torch.ops.sparse_kernels.dense_scatter.default
_sample_on_cpu = torch.ops.sparse_kernels.dense_sample.default


class Geometry(Protocol):
    """What a stripe needs of a topology."""

    rows: int
    cols: int
    groups: int
    block_size: tuple[int, int]
    shape: tuple[int, ...]
    taps: int


@dataclass
class Weight:
    """The geometry of a weight inside an operator, where there is no `Topology`, and its arrays by rows."""

    rows: int
    cols: int
    groups: int
    block_size: tuple[int, int]
    shape: tuple[int, ...]
    taps: int
    n: int = 0
    index: Tensor | None = None

    @functools.cached_property
    def _arrays(self) -> layout.Arrays:
        assert self.index is not None
        blocks = self.block_size != (1, 1)
        grid = (self.n, self.rows, self.cols, self.groups)
        return layout.split(self.index, *grid, blocks, gpu=False, transposed=blocks)

    @property
    def row_ptr(self) -> Tensor:  # noqa: D102
        return self._arrays.row_ptr

    @property
    def col_idx(self) -> Tensor:  # noqa: D102
        return self._arrays.col_idx

    @property
    def slot(self) -> Tensor | None:  # noqa: D102
        return self._arrays.slot

    @property
    def place(self) -> tuple[Tensor | None, int, int, int, int]:
        """What the scatter and the sampling on a CPU take of it."""
        return self.index, self.rows, self.cols, self.groups, self.taps

    @property
    def is_full(self) -> bool:
        """Whether the values are the dense weight, element by element."""
        return self.block_size == (1, 1) and self.n == self.rows * self.cols


def under_autocast(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    return device != "meta" and torch.is_autocast_enabled(device)  # which raises for meta


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Without autocast: operands have the dtype to compute in already."""
    return torch.autocast(device, enabled=False) if under_autocast(device) else nullcontext()


# stripes of a dense gradient ------------------------------------------------------------------


def stripes(weight: Geometry, device: str = "cpu") -> list[tuple[int, int]]:
    """Ranges of block rows whose dense gradient is about `_STRIPE_ELEMENTS`; none crosses a group."""
    b_out, b_in = weight.block_size
    row = max(1, weight.cols * b_out * b_in)
    step = max(1, _STRIPE_ELEMENTS.get(device, _STRIPE_ELEMENTS["cpu"]) // row)
    per_group = weight.rows // weight.groups
    return [
        (begin, min(begin + step, (g + 1) * per_group))
        for g in range(weight.groups)
        for begin in range(g * per_group, (g + 1) * per_group, step)
    ]


def linear_stripe(x: Tensor, dy: Tensor, weight: Geometry, begin: int, end: int) -> Tensor:
    """Rows of the dense weight gradient for block rows `begin:end`: `[(end - begin) * b_out, in]`."""
    b_out = weight.block_size[0]
    return dy[:, begin * b_out : end * b_out].t() @ x


def conv2d_stripe(
    x: Tensor,
    dy: Tensor,
    weight: Geometry,
    begin: int,
    end: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """The same for a convolution: `[(end - begin) * b_out, in/groups, kh, kw]`."""
    b_out, channels = weight.block_size[0], weight.shape[1]
    group = begin // max(1, weight.rows // groups)
    x = x[:, group * channels : (group + 1) * channels]
    dy = dy[:, begin * b_out : end * b_out]
    like = x.new_empty(()).expand(dy.shape[1], *weight.shape[1:])
    conf = (list(stride), list(padding), list(dilation), False, [0, 0], 1, [False, True, False])
    return torch.ops.aten.convolution_backward(dy, x, like, None, *conf)[1]


def stripe_to_blocks(gradient: Tensor, weight: Geometry) -> Tensor:
    """A stripe of the dense gradient as blocks: `[block rows, cols, b_out, b_in]`."""
    b_out, b_in = weight.block_size
    rows, inner = gradient.shape[0] // b_out, weight.shape[1] // b_in
    parts = gradient.reshape(rows, b_out, inner, b_in, weight.taps)
    return parts.permute(0, 2, 4, 1, 3).reshape(rows, weight.cols, b_out, b_in)


def growth_norms(x: Tensor, dy: Tensor, b_out: int, b_in: int, score: str) -> Tensor:
    """Norms of the blocks of `dY^T X` by stripes, `[out / b_out, in / b_in]` float32 (or float64, as `x`)."""
    grid = (dy.shape[1] // b_out, x.shape[1] // b_in)
    weight = Weight(*grid, 1, (b_out, b_in), (dy.shape[1], x.shape[1]), 1)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scores = x.new_empty(grid, dtype=wide)
    with no_autocast(x.device.type):
        for begin, end in stripes(weight, x.device.type):
            blocks = stripe_to_blocks(
                linear_stripe(x.to(wide), dy.to(wide), weight, begin, end), weight
            ).flatten(2)
            scores[begin:end] = blocks.abs().sum(-1) if score == "l1" else blocks.square().sum(-1).sqrt()
    return scores


# between values and dense weights -------------------------------------------------------------


def scatter(values: Tensor, weight: Weight) -> Tensor:
    """Values -> dense weight, zeros where inactive. A view of the values if it is full."""
    if weight.is_full:
        return values.view(weight.shape)
    if _by_kernel(values):
        from .triton import densify

        dense = values.new_empty(weight.shape)
        densify.scatter(values, dense, weight.row_ptr, weight.col_idx, weight.slot, weight.taps)
        return dense
    if values.is_cpu:
        dense = values.new_empty(weight.shape)
        if dense.numel() > 0:
            _scatter_on_cpu(values, *weight.place, 0, dense)
        return dense
    b_out, b_in = weight.block_size
    slot = weight.slot
    blocks = values.reshape(weight.n, b_out, b_in)
    blocks = blocks if slot is None else blocks[slot]
    grid = values.new_zeros(weight.rows * weight.cols, b_out, b_in)
    grid[_positions(weight)] = blocks
    parts = grid.reshape(weight.shape[0] // b_out, weight.shape[1] // b_in, weight.taps, b_out, b_in)
    return parts.permute(0, 3, 1, 4, 2).reshape(weight.shape).contiguous()


def sample(
    stripe_of: Callable[[int, int], Tensor], values_size: _Ints, weight: Weight, device: str
) -> Tensor:
    """The gradient of the values, from `stripe_of(begin, end)` for all stripes."""
    if weight.is_full and weight.groups == 1:
        return stripe_of(0, weight.rows).reshape(values_size)
    positions, found = None, None
    for begin, end in stripes(weight, device):
        stripe = stripe_of(begin, end)
        if found is None:
            found = stripe.new_empty(values_size) if stripe.is_cpu else stripe.new_zeros(values_size)
        if _by_kernel(found):
            from .triton import densify

            arrays = (weight.row_ptr, weight.col_idx, weight.slot, weight.taps)
            densify.sample(stripe.contiguous(), found, *arrays, begin, end)
            continue
        if stripe.is_cpu:
            _sample_on_cpu(stripe.contiguous(), *weight.place, begin, found)
            continue
        # Fixed shapes, so that nothing is read on the host: what lies in other stripes is asked for at their
        # edge, and not taken.
        slot = weight.slot
        positions = _positions(weight) if positions is None else positions
        blocks = stripe_to_blocks(stripe, weight).flatten(0, 1)
        low, count = begin * weight.cols, (end - begin) * weight.cols
        inside = (positions >= low) & (positions < low + count)
        taken = blocks[(positions - low).clamp_(0, count - 1)].reshape(values_size)
        inside = inside.reshape(-1, *(1 for _ in values_size[1:]))
        if slot is None:
            found = torch.where(inside, taken, found)
        else:
            found[slot] = torch.where(inside, taken, found[slot])
    if found is None:
        raise RuntimeError("a weight without rows has no gradient to sample")
    return found


def _by_kernel(values: Tensor) -> bool:
    if not has_triton(values.device.type):
        return False
    from .triton import densify

    return densify.takes(values)


def _positions(weight: Weight) -> Tensor:
    """Flat positions in row order, int64."""
    counts = weight.row_ptr.diff().long()
    rows = torch.arange(weight.rows, device=counts.device).repeat_interleave(counts, output_size=weight.n)
    return rows * weight.cols + weight.col_idx


def _weight(
    index: Tensor,
    size: _Ints | torch.Size,
    rows: int,
    cols: int,
    groups: int = 1,
    kernel: _Ints | None = None,
) -> Weight:
    """From an operator's arguments."""
    n = size[0]
    b_out, b_in = (size[1], size[2]) if len(size) == 3 else (1, 1)
    taps = kernel[0] * kernel[1] if kernel else 1
    shape = (rows * b_out, cols // taps * b_in, *(kernel or ()))
    return Weight(rows, cols, groups, (b_out, b_in), shape, taps, n, index)


# the operators --------------------------------------------------------------------------------


def dense_linear_forward(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, rows: int, cols: int
) -> Tensor:
    """As `linear_forward`."""
    with no_autocast(x.device.type):
        return F.linear(x, scatter(values, _weight(index, values.shape, rows, cols)), bias)


def dense_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    values: Tensor | None,
    index: Tensor,
    rows: int,
    cols: int,
    values_size: _Ints,
    need_bias: bool,
) -> _Grads:
    """As `linear_backward`."""
    weight = _weight(index, values_size, rows, cols)
    dx = dw = dy.new_empty(0)
    with no_autocast(dy.device.type):
        if values is not None:
            dx = dy @ scatter(values, weight)
        if x is not None:
            dw = _weight_gradient(dy, values_size, weight, lambda b, e: linear_stripe(x, dy, weight, b, e))
    return dx, dw, dy.sum(0) if need_bias else dy.new_empty(0)


def dense_conv2d_forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Tensor,
    rows: int,
    cols: int,
    kernel: _Ints,
    stride: _Ints,
    padding: _Ints,
    dilation: _Ints,
    groups: int,
) -> Tensor:
    """As `conv2d_forward`."""
    weight = _weight(index, values.shape, rows, cols, groups, kernel)
    with no_autocast(x.device.type):
        return _in_format(
            F.conv2d(x, scatter(values, weight), bias, stride, padding, dilation, groups), like=x
        )


def dense_conv2d_backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    index: Tensor,
    rows: int,
    cols: int,
    kernel: _Ints,
    stride: _Ints,
    padding: _Ints,
    dilation: _Ints,
    groups: int,
    need_x: bool,
    need_values: bool,
    need_bias: bool,
) -> _Grads:
    """As `conv2d_backward`."""
    size = list(values.shape)
    weight = _weight(index, size, rows, cols, groups, kernel)
    dx = dw = x.new_empty(0)
    with no_autocast(x.device.type):
        if need_x:
            conf = (stride, padding, dilation, False, [0, 0], groups, [True, False, False])
            dense = scatter(values, weight)
            dx = _in_format(torch.ops.aten.convolution_backward(dy, x, dense, None, *conf)[0], like=x)
        if need_values:
            conf2 = (_pair(stride), _pair(padding), _pair(dilation), groups)
            dw = _weight_gradient(dy, size, weight, lambda b, e: conv2d_stripe(x, dy, weight, b, e, *conf2))
    return dx, dw, dy.sum((0, 2, 3)) if need_bias else dy.new_empty(0)


def _weight_gradient(
    like: Tensor, size: _Ints, weight: Weight, stripe_of: Callable[[int, int], Tensor]
) -> Tensor:
    if weight.n == 0 or weight.rows * weight.cols == 0:
        return like.new_zeros(size)
    return sample(stripe_of, size, weight, like.device.type)


def _pair(sizes: _Ints) -> tuple[int, int]:
    return sizes[0], sizes[1]


def _in_format(image: Tensor, like: Tensor) -> Tensor:
    """In the memory format that the operator's fake promises."""
    last = is_channels_last(like)
    return image.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


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
