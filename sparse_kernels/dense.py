"""The "dense" backend: the weight scattered into a dense scratch, the dense library's products.

Worth it at high density only. The gradient of the values is sampled from stripes of the dense one, so
that no gradient of the dense size is kept.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .topology import Topology

_STRIPE_ELEMENTS = 1 << 20  # of the dense gradient held at a time (4 MiB in float32)


def under_autocast(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    return device != "meta" and torch.is_autocast_enabled(device)  # which raises for meta


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Without autocast: operands have the dtype to compute in already."""
    return torch.autocast(device, enabled=False) if under_autocast(device) else nullcontext()


def stripes(topology: Topology) -> list[tuple[int, int]]:
    """Ranges of block rows whose dense gradient is about `_STRIPE_ELEMENTS`; none crosses a group."""
    row = max(1, topology.cols * topology.block_numel)
    step = max(1, _STRIPE_ELEMENTS // row)
    per_group = topology.rows // topology.groups
    return [
        (begin, min(begin + step, (g + 1) * per_group))
        for g in range(topology.groups)
        for begin in range(g * per_group, (g + 1) * per_group, step)
    ]


def linear_stripe(x: Tensor, dy: Tensor, topology: Topology, begin: int, end: int) -> Tensor:
    """Rows of the dense weight gradient for block rows `begin:end`: `[(end - begin) * b_out, in]`."""
    b_out = topology.block_size[0]
    return dy[:, begin * b_out : end * b_out].t() @ x


def conv2d_stripe(
    x: Tensor,
    dy: Tensor,
    topology: Topology,
    begin: int,
    end: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """The same for a convolution: `[(end - begin) * b_out, in/groups, kh, kw]`."""
    b_out, channels = topology.block_size[0], topology.shape[1]
    group = begin // max(1, topology.rows // groups)
    x = x[:, group * channels : (group + 1) * channels]
    dy = dy[:, begin * b_out : end * b_out]
    weight = x.new_empty(()).expand(dy.shape[1], *topology.shape[1:])
    conf = (list(stride), list(padding), list(dilation), False, [0, 0], 1, [False, True, False])
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *conf)[1]


def stripe_to_blocks(gradient: Tensor, topology: Topology) -> Tensor:
    """A stripe of the dense gradient as blocks: `[block rows, cols, b_out, b_in]`."""
    b_out, b_in = topology.block_size
    rows, inner = gradient.shape[0] // b_out, topology.shape[1] // b_in
    parts = gradient.reshape(rows, b_out, inner, b_in, topology.taps)
    return parts.permute(0, 2, 4, 1, 3).reshape(rows, topology.cols, b_out, b_in)


def _sampled(topology: Topology, like: Tensor, stripe: Any) -> Tensor:
    """Gradient of the values, sampled stripe by stripe from `stripe(begin, end)`."""
    positions, ptr = topology.positions(), topology.row_ptr.tolist()
    blocks = like.new_empty(topology.n_blocks, *topology.block_size)
    for begin, end in stripes(topology):
        low, high = ptr[begin], ptr[end]
        if low < high:
            part = stripe_to_blocks(stripe(begin, end), topology).flatten(0, 1)
            blocks[low:high] = part[positions[low:high] - begin * topology.cols]
    return blocks.reshape(like.shape)


def _whole_gradient() -> bool:
    """Whether a backward is differentiated again, or traced: then in torch's operations, and at once."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


class _DenseLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, topology: Topology
    ) -> Tensor:
        ctx.save_for_backward(x, values, index)
        ctx.topology = topology
        with no_autocast(x.device.type):
            return F.linear(x, topology.to_dense(values), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, values, _ = ctx.saved_tensors
        topology: Topology = ctx.topology
        need_x, need_values, need_bias = ctx.needs_input_grad[:3]
        dx = dvalues = None
        with no_autocast(x.device.type):
            if need_x:
                dx = dy @ topology.to_dense(values)
            if need_values and _whole_gradient():
                dvalues = topology.gather(dy.t() @ x)
            elif need_values:
                dvalues = _sampled(topology, values, lambda b, e: linear_stripe(x, dy, topology, b, e))
        return dx, dvalues, dy.sum(0) if need_bias else None, None, None


class _DenseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        index: Tensor,
        topology: Topology,
        *conf: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, values, index)
        ctx.topology, ctx.conf = topology, conf
        with no_autocast(x.device.type):
            return F.conv2d(x, topology.to_dense(values), bias, *conf)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, values, _ = ctx.saved_tensors
        topology: Topology = ctx.topology
        need_x, need_values, need_bias = ctx.needs_input_grad[:3]
        stride, padding, dilation, groups = ctx.conf
        whole = need_values and _whole_gradient()
        conf = ([*stride], [*padding], [*dilation], False, [0, 0], groups, [need_x, whole, False])
        dx = dvalues = None
        with no_autocast(x.device.type):
            if need_x or whole:
                w = topology.to_dense(values)
                dx, dw, _ = torch.ops.aten.convolution_backward(dy, x, w, None, *conf)
            if whole:
                dvalues = topology.gather(dw)
            elif need_values:
                dvalues = _sampled(
                    topology, values, lambda b, e: conv2d_stripe(x, dy, topology, b, e, *ctx.conf)
                )
        dbias = dy.sum((0, 2, 3)) if need_bias else None
        return dx, dvalues, dbias, None, None, *(None for _ in ctx.conf)


def linear(x: Tensor, values: Tensor, topology: Topology, bias: Tensor | None) -> Tensor:
    """`functional.linear` on `[tokens, in]` through the dense library."""
    return _DenseLinear.apply(x, values, bias, topology.index, topology)


def conv2d(x: Tensor, values: Tensor, topology: Topology, bias: Tensor | None, *conf: Any) -> Tensor:
    """`functional.conv2d` through the dense library; `conf` is stride, padding, dilation, groups."""
    return _DenseConv2d.apply(x, values, bias, topology.index, topology, *conf)
