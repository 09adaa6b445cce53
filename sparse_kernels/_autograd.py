"""Derivatives of the operators, of any order.

A product is linear in `x` and in `values`, so the derivatives of its gradients are products again. Autograd
stands outside the operators; in an ordinary backward (`create_graph=False`) nothing but them is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _ops

_Maybe = Tensor | None


def product(kind: str, x: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, *conf: Any) -> Tensor:
    """`y` of a "linear" or "conv2d" operator, differentiable in `x`, `values` and `bias`.

    `x` and `values` are in a layout that the operator takes; `conf` is what it takes after `index`.
    """
    # Skipped when nothing needs a gradient: a Function costs as much as a small product.
    wanted = x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    if wanted and torch.is_grad_enabled():
        return _Product.apply(kind, x, values, bias, index, *conf)
    return _forward_operator(kind)(x, values, bias, index, *conf)


def _forward_operator(kind: str) -> Callable[..., Tensor]:
    return _ops.linear_forward if kind == "linear" else _ops.conv2d_forward


def _gradients(
    kind: str,
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    index: Tensor,
    conf: tuple[Any, ...],
    need: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """The gradients of `x`, `values` and `bias` that `need` names; empty tensors for the others."""
    dy = _like(dy, x)
    # Compiled code is never differentiated twice, and the compiler does not trace a Function in a backward.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Gradients.apply(kind, dy, x, values, index, conf, need)
    operator = _ops.linear_backward if kind == "linear" else _ops.conv2d_backward
    return operator(dy, x, values, index, *conf, *need)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, kind: str, x: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, *conf: Any
    ) -> Tensor:
        # `index` is saved too: its version counter then catches an update between forward and backward.
        ctx.save_for_backward(x, values, index)
        ctx.kind, ctx.conf = kind, conf
        return _forward_operator(kind)(x, values, bias, index, *conf)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[_Maybe, ...]:  # type: ignore[override]
        x, values, index = ctx.saved_tensors
        need = ctx.needs_input_grad[1:4]
        grads = _gradients(ctx.kind, dy, x, values, index, ctx.conf, need)
        wanted = (g if n else None for g, n in zip(grads, need, strict=True))
        return None, *wanted, None, *(None for _ in ctx.conf)


class _Gradients(torch.autograd.Function):
    """dX = dY W, dW = dY^T X at the active positions, db = the sum of dY; and their derivatives."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        kind: str,
        dy: Tensor,
        x: Tensor,
        values: Tensor,
        index: Tensor,
        conf: tuple[Any, ...],
        need: tuple[bool, ...],
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(dy, x, values, index)
        ctx.kind, ctx.conf = kind, conf
        ctx.set_materialize_grads(False)
        return _gradients(kind, dy, x, values, index, conf, need)

    @staticmethod
    def backward(ctx: Any, to_dx: _Maybe, to_dw: _Maybe, to_db: _Maybe) -> tuple[_Maybe, ...]:  # type: ignore[override]
        dy, x, values, index = ctx.saved_tensors
        kind, conf = ctx.kind, ctx.conf
        _, need_dy, need_x, need_values, *_ = ctx.needs_input_grad
        g_dy = g_x = g_values = None
        if need_dy:
            parts = []
            if to_dx is not None:
                parts.append(product(kind, _like(to_dx, x), values, None, index, *conf))
            if to_dw is not None:
                parts.append(product(kind, x, to_dw.contiguous(), None, index, *conf))
            if to_db is not None:
                parts.append(to_db.reshape(-1, *(1 for _ in dy.shape[2:])).expand_as(dy))
            g_dy = sum(parts[1:], parts[0]) if parts else None
        if need_x and to_dw is not None:
            g_x = _gradients(kind, dy, x, to_dw.contiguous(), index, conf, (True, False, False))[0]
        if need_values and to_dx is not None:
            g_values = _gradients(kind, dy, _like(to_dx, x), values, index, conf, (False, True, False))[1]
        return None, g_dy, g_x, g_values, None, None, None


def _like(gradient: Tensor, x: Tensor) -> Tensor:
    """In the layout of `x`."""
    return gradient.contiguous(
        memory_format=torch.channels_last if _ops.is_channels_last(x) else torch.contiguous_format
    )
