"""Derivatives of the operators, of any order.

A product is linear in `x` and in `values`, so the derivatives of its gradients are products again. Autograd
stands outside the operators; in an ordinary backward (`create_graph=False`) nothing but them is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _ops
from .backend import exporting

_Maybe = Tensor | None
_Operands = tuple[_Maybe, _Maybe, Tensor]  # x, values, index
_Sizes = tuple[int, ...]
_Conf = tuple[Any, ...]  # what an operator takes after `index`
_KINDS = ("linear", "conv2d", "dense_linear", "dense_conv2d", "triton_linear")
_FORWARD = {kind: getattr(_ops, f"{kind}_forward") for kind in _KINDS}
_BACKWARD = {kind: getattr(_ops, f"{kind}_backward") for kind in _KINDS}
_CONV = frozenset(kind for kind in _KINDS if kind.endswith("conv2d"))


def product(
    kind: str,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Tensor,
    conf: _Conf,
    ticket: _Maybe = None,
) -> Tensor:
    """`y` of the operator `kind + "_forward"`, differentiable in `x`, `values` and `bias`.

    `x` and `values` are in a layout that the operator takes; `conf` is what it takes after `index`. The
    growth scorer of `ticket` is shown the factors of whatever is added to the gradient of `values`.
    """
    if exporting():  # an exported program has no Function: its operators must know
        return (_ops.conv2d if kind in _CONV else _ops.linear)(x, values, bias, index, *conf)
    # Skipped when nothing needs a gradient: a Function costs as much as a small product. Forward-mode
    # differentiation it refuses by name, where the operator alone would lose the tangent.
    wanted = values.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
    if (wanted and torch.is_grad_enabled()) or forward_ad._current_level >= 0:
        apply = _Product.apply if torch.compiler.is_compiling() else _apply
        tickets = () if ticket is None else (ticket,)
        return apply((kind, conf), x, values, bias, index, *tickets)  # type: ignore[no-any-return]
    return _FORWARD[kind](x, values, bias, index, *conf)


def _saved(kind: str, x: Tensor, values: Tensor, index: Tensor, need: tuple[bool, ...]) -> _Operands:
    """What a backward keeps.

    As torch's own: a Linear neither keeps nor guards what its gradients do not read, a convolution keeps all.
    `index` is among it: its version counter then catches an update between forward and backward.
    """
    if kind in _CONV:
        return x, values, index
    return x if need[1] else None, values if need[0] else None, index


def _gradients(
    kind: str,
    dy: Tensor,
    operands: _Operands,
    conf: _Conf,
    values_size: _Sizes,
    need: tuple[bool, bool, bool],
    ticket: _Maybe = None,
) -> tuple[Tensor, ...]:
    """The gradients of `x`, `values` and `bias` that `need` names; empty tensors for the others.

    `operands`: those that `_saved` keeps for them, or more.
    """
    x, values, index = operands
    need_x, need_values, need_bias = need
    if ticket is not None and x is not None and need_values:
        settings = [*conf[3], *conf[4], *conf[5], conf[6]] if kind in _CONV else []
        _ops.observe(ticket, x, dy, settings, True)
    # Compiled code is never differentiated twice, and the compiler does not trace a Function in a backward.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Gradients.apply(kind, ticket, dy, x, values, index, conf, values_size, need)  # type: ignore[no-any-return]
    backward = _BACKWARD[kind]
    if kind in _CONV:
        return backward(_like(dy, x), x, values, index, *conf, *need)  # type: ignore[no-any-return]
    x, values = x if need_values else None, values if need_x else None
    return backward(dy.contiguous(), x, values, index, *conf, values_size, need_bias)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        call: tuple[str, _Conf],
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        index: Tensor,
        *ticket: Tensor,
    ) -> Tensor:
        # Few arguments and attributes: each costs a small layer 0.3 us.
        kind, conf = call
        ctx.save_for_backward(*_saved(kind, x, values, index, ctx.needs_input_grad[1:3]), *ticket)
        ctx.call = kind, conf, values.shape
        return _FORWARD[kind](x, values, bias, index, *conf)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[_Maybe, ...]:  # type: ignore[override]
        x, values, index, *ticket = ctx.saved_tensors
        kind, conf, values_size = ctx.call
        need_x, need_values, need_bias = need = ctx.needs_input_grad[1:4]
        dx, dw, db = _gradients(kind, dy, (x, values, index), conf, values_size, need, *ticket)
        none = (None,) * (1 + len(ticket))
        return None, dx if need_x else None, dw if need_values else None, db if need_bias else None, *none


# What `_Product.apply` comes to outside compiled code and functorch's transforms, which `functional` refuses:
# it costs 2 us less.
_apply = super(torch.autograd.Function, _Product).apply


class _Gradients(torch.autograd.Function):
    """dX = dY W, dW = dY^T X at the active positions, db = the sum of dY; and their derivatives."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        kind: str,
        ticket: _Maybe,
        dy: Tensor,
        x: _Maybe,
        values: _Maybe,
        index: Tensor,
        conf: _Conf,
        values_size: _Sizes,
        need: tuple[bool, bool, bool],
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(ticket, dy, x, values, index)
        ctx.kind, ctx.conf, ctx.values_size = kind, conf, values_size
        ctx.set_materialize_grads(False)
        return _gradients(kind, dy, (x, values, index), conf, values_size, need)

    @staticmethod
    def backward(ctx: Any, to_dx: _Maybe, to_dw: _Maybe, to_db: _Maybe) -> tuple[_Maybe, ...]:  # type: ignore[override]
        ticket, dy, x, values, index = ctx.saved_tensors
        kind, conf, sizes = ctx.kind, ctx.conf, ctx.values_size
        _, _, need_dy, need_x, need_values, *_ = ctx.needs_input_grad
        g_dy = g_x = g_values = None
        if need_dy:
            parts = []
            if to_dx is not None:
                parts.append(product(kind, _like(to_dx, x), values, None, index, conf, ticket))
            if to_dw is not None:
                parts.append(product(kind, x, to_dw.contiguous(), None, index, conf))
            if to_db is not None:
                parts.append(to_db.reshape(-1, *(1 for _ in dy.shape[2:])).expand_as(dy))
            g_dy = sum(parts[1:], parts[0]) if parts else None
        if need_x and to_dw is not None:
            operands = (x, to_dw.contiguous(), index)
            g_x = _gradients(kind, dy, operands, conf, sizes, (True, False, False))[0]
        if need_values and to_dx is not None:
            operands = (_like(to_dx, x), values, index)
            g_values = _gradients(kind, dy, operands, conf, sizes, (False, True, False), ticket)[1]
        return None, None, g_dy, g_x, g_values, None, None, None, None


def _like(gradient: Tensor, x: _Maybe) -> Tensor:
    """In the layout of images `x`; contiguous for a Linear."""
    last = x is not None and x.dim() == 4 and _ops.is_channels_last(x)
    return gradient.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _differentiable(kind: str) -> None:
    """Register the derivatives of the operator that exported programs hold."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, _, index, *conf = inputs
        ctx.save_for_backward(*_saved(kind, x, values, index, ctx.needs_input_grad[:3]))
        ctx.conf, ctx.values_size = conf, list(values.shape)

    def backward(ctx: Any, dy: Tensor) -> tuple[_Maybe, ...]:
        need = ctx.needs_input_grad[:3]
        grads = _gradients(kind, dy, ctx.saved_tensors, tuple(ctx.conf), ctx.values_size, need)
        return *(g if n else None for g, n in zip(grads, need, strict=True)), None, *(None for _ in ctx.conf)

    torch.library.register_autograd(f"sparse_kernels::{kind}", backward, setup_context=setup)


_differentiable("linear")
_differentiable("conv2d")
