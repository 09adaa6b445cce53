"""Differentiable products with a sparse weight. All three products (output, input gradient, weight
gradient) touch active weights only.

The way through: a public function here checks its arguments and casts under autocast, `backend.select`
chooses the implementation, a Function in `_autograd` calls the operator (`_ops`), whose kernel gets raw
pointers. The Function stands outside the operator, and is skipped when nothing needs a gradient.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _ops, dense, reference
from ._autograd import product
from .backend import select
from .topology import Topology

_NATIVE = (torch.float32, torch.float64)  # dtypes that the CPU kernels compute in
# Dtypes that they read and write as well, for single weights of a Linear, computing in float32; elsewhere on
# the CPU torch converts.
_STORED = (torch.bfloat16, torch.float16)
_LINEAR = {"cpu": "linear", "triton": "triton_linear", "dense": "dense_linear"}  # operators, by backend
_Pair = tuple[int, int]


def linear(x: Tensor, values: Tensor, topology: Topology, bias: Tensor | None = None) -> Tensor:
    """Sparse linear map: `y = x @ W.T + bias`, W given by its active values.

    Args:
        x: `[*, in_features]`, any strides, floating point.
        values: `[nnz]` (CSR) or `[n_blocks, b_out, b_in]` (BSR), in the order of `topology`; dtype of `x`.
        topology: a topology of shape `(out_features, in_features)`.
        bias: `[out_features]`, or None.

    Returns:
        `[*, out_features]`, dtype of `x` (under autocast: the autocast dtype). Differentiable in
        `x`, `values` and `bias`, twice too.

    Raises:
        ValueError: shapes or devices that do not fit together.
        TypeError: dtypes that differ, or are not floating point.

    Notes:
        Accumulates in float32 (float64 for float64). Slower than dense at high density: docs/when-slower.md.

    Example:
        >>> topology = Topology.random((8, 16), density=0.25)
        >>> linear(torch.randn(3, 16), torch.randn(topology.nnz), topology).shape
        torch.Size([3, 8])
    """
    return _linear(x, values, topology, bias)


def conv2d(
    x: Tensor,
    values: Tensor,
    topology: Topology,
    bias: Tensor | None = None,
    stride: int | _Pair = 1,
    padding: int | _Pair | str = 0,
    dilation: int | _Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Sparse 2-D convolution with zero padding, as `torch.nn.functional.conv2d`.

    Args:
        x: `[n, in_channels, h, w]` or `[in_channels, h, w]`, any strides, floating point.
        values: `[nnz]` or `[n_blocks, b_out, b_in]`, in the order of `topology`; dtype of `x`.
        topology: a topology of shape `(out_channels, in_channels / groups, kh, kw)`, same groups.
        bias: `[out_channels]`, or None.
        stride, padding, dilation: an int or a pair (height, width); `padding` also `"valid"` or `"same"`.
        groups: convolution groups.

    Returns:
        `[n, out_channels, oh, ow]` in the memory format of `x`, dtype of `x` (under autocast: the autocast
        dtype). Differentiable in `x`, `values` and `bias`, twice too.

    Raises:
        ValueError: shapes or devices that do not fit together, an empty output.
        TypeError: dtypes that differ, or are not floating point.
    """
    steps = _pair(stride, "stride", 1)
    if padding == "same" and max(steps) > 1:
        raise ValueError(f'padding="same" needs stride 1, got {steps}')
    return _conv2d(x, values, topology, bias, steps, padding, _pair(dilation, "dilation", 1), groups)


def _linear(
    x: Tensor,
    values: Tensor,
    topology: Topology,
    bias: Tensor | None,
    ticket: Tensor | None = None,
) -> Tensor:
    # The most common case in as few steps as possible, for layers that are as small as a call: nothing is to
    # be cast or copied. Here the operator's checks find what does not fit; the way in general then says it in
    # better words.
    try:
        if (
            x.is_cpu
            and x.is_contiguous()
            and x.dim() == 2
            and (x.dtype in _NATIVE or (x.dtype in _STORED and not topology.is_bsr))
            and values.is_contiguous()
            and len(topology.shape) == 2
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._are_functorch_transforms_active()
            and select(x, topology) == "cpu"
        ):
            conf = (topology.rows, topology.cols)
            return product("linear", x, values, bias, topology.index, conf, ticket)
    except (RuntimeError, AttributeError):
        pass
    return _linear_in_general(x, values, topology, bias, ticket)


def _linear_in_general(
    x: Tensor, values: Tensor, topology: Topology, bias: Tensor | None, ticket: Tensor | None
) -> Tensor:
    _check(x, values, topology, bias, dims=2)
    if x.dim() < 1 or x.shape[-1] != topology.shape[1]:
        raise ValueError(
            f"expected an input of shape [*, {topology.shape[1]}] for a weight of shape {topology.shape}, "
            f"got {list(x.shape)}"
        )
    x, values, bias, out_dtype = _cast(x, values, bias, topology)
    flat = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    name = _select(x, topology)
    if name == "reference":
        y = reference.linear(flat, values, topology, bias)
        if ticket is not None:
            y = _Observe.apply(y, flat, ticket, [])
    else:
        operands = (flat.contiguous(), values.contiguous(), bias, topology.index)
        y = product(_LINEAR[name], *operands, (topology.rows, topology.cols), ticket)
    if x.dim() != 2:
        y = y.reshape(*x.shape[:-1], topology.shape[0])
    return y if y.dtype == out_dtype else y.to(out_dtype)


def _conv2d(
    x: Tensor,
    values: Tensor,
    topology: Topology,
    bias: Tensor | None,
    stride: _Pair,
    padding: int | _Pair | str,
    dilation: _Pair,
    groups: int,
    ticket: Tensor | None = None,
) -> Tensor:
    _check(x, values, topology, bias, dims=4)
    if groups != topology.groups:
        raise ValueError(f"groups is {groups}, but the topology was built for groups = {topology.groups}")
    channels = topology.shape[1] * groups
    if x.dim() not in (3, 4) or x.shape[-3] != channels:
        raise ValueError(
            f"expected an input of shape [n, {channels}, h, w] or [{channels}, h, w] for a weight of shape "
            f"{topology.shape} with groups = {groups}, got {list(x.shape)}"
        )
    x, values, bias, out_dtype = _cast(x, values, bias, topology)
    image = x if x.dim() == 4 else x.unsqueeze(0)
    kernel = topology.shape[2:]
    image, pads = _explicit_padding(image, padding, kernel, dilation)
    size = _ops.conv2d_output_size((image.shape[2], image.shape[3]), kernel, stride, pads, dilation)
    if min(size) < 1:
        raise ValueError(
            f"the output would be empty ({size[0]} x {size[1]}): input {list(x.shape)}, kernel {kernel}, "
            f"stride {stride}, padding {padding}, dilation {dilation}"
        )
    name = _select(image, topology, size[0] * size[1])
    conf = (stride, pads, dilation, groups)
    if name == "reference":
        y = reference.conv2d(image, values, topology, bias, *conf)
        if ticket is not None:
            y = _Observe.apply(y, image, ticket, [*stride, *pads, *dilation, groups])
    else:
        # One of the two formats that the kernels read; a strided image is copied to the nearer one.
        if not (image.is_contiguous() or _ops.is_channels_last(image)):
            inner_channels = image.stride(1) == 1 and image.shape[1] > 1
            image = image.contiguous(
                memory_format=torch.channels_last if inner_channels else torch.contiguous_format
            )
        ints = [list(pair) for pair in (kernel, stride, pads, dilation)]
        operands = (image, values.contiguous(), bias, topology.index)
        kind = "dense_conv2d" if name == "dense" else "conv2d"
        y = product(kind, *operands, (topology.rows, topology.cols, *ints, groups), ticket)
    return (y if x.dim() == 4 else y.squeeze(0)).to(out_dtype)


# checks and casts -----------------------------------------------------------------------------


def _pair(value: Any, name: str, least: int) -> _Pair:
    """An int or a pair of them, as a pair of numbers that are at least `least`."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, Integral) for n in pair):
        raise TypeError(f"{name} must be an int or a pair of them, got {value!r}")
    if min(pair) < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return int(pair[0]), int(pair[1])


def _check(x: Tensor, values: Tensor, topology: Topology, bias: Tensor | None, dims: int) -> None:
    if len(topology.shape) != dims:
        kind = "Linear (out, in)" if dims == 2 else "Conv2d (out, in/groups, kh, kw)"
        raise ValueError(f"expected the topology of a {kind} weight, got shape {topology.shape}")
    wanted = topology.values_shape
    if values.shape != wanted:
        raise ValueError(f"values must have shape {wanted} for {topology}, got {tuple(values.shape)}")
    if bias is not None and bias.shape != topology.shape[:1]:
        raise ValueError(f"bias must have shape ({topology.shape[0]},), got {tuple(bias.shape)}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    dtype, device = x.dtype, x.device
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense (strided) tensor, got {x.layout}; x.to_dense() makes it one")
    if not dtype.is_floating_point:
        raise TypeError(f"x must be floating point (float32, float64, bfloat16 or float16), got {dtype}")
    for name, t in (("values", values), ("bias", bias)):
        if t is None:
            continue
        if t.device != device:
            raise ValueError(f"x is on {device}, but {name} on {t.device}: move one of them")
        if t.dtype != dtype and (dtype == torch.float64 or not dense.under_autocast(device.type)):
            raise TypeError(f"{name} must have the dtype of x, {dtype}, got {t.dtype}")
    if topology.index.device != device and device.type != "meta":
        raise ValueError(f"x is on {x.device}, but the topology on {topology.device}: use topology.to()")


def _cast(
    x: Tensor, values: Tensor, bias: Tensor | None, topology: Topology
) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype]:
    """Inputs in the dtype to compute in, and the dtype of the output."""
    device = x.device.type
    out = x.dtype
    if dense.under_autocast(device) and x.dtype != torch.float64:
        out = torch.get_autocast_dtype(device)
        x, values = x.to(out), values.to(out)
        bias = None if bias is None else bias.to(out)
    if device == "cpu" and out not in _NATIVE and not _reads(out, x, topology):
        x, values = x.float(), values.float()
        bias = None if bias is None else bias.float()
    return x, values, None if bias is None else bias.contiguous(), out


def _reads(dtype: torch.dtype, x: Tensor, topology: Topology) -> bool:
    """Whether the kernels on the CPU that would run take this reduced dtype as it is."""
    single = len(topology.shape) == 2 and not topology.is_bsr
    return dtype in _STORED and single and select(x, topology) == "cpu"


def _explicit_padding(
    x: Tensor, padding: int | _Pair | str, kernel: tuple[int, ...], dilation: _Pair
) -> tuple[Tensor, _Pair]:
    """Symmetric zero padding as numbers; what is asymmetric ("same" with an even kernel) is done here."""
    if not isinstance(padding, str):
        return x, _pair(padding, "padding", 0)
    if padding == "valid":
        return x, (0, 0)
    if padding != "same":
        raise ValueError(f'padding must be an int, a pair, "valid" or "same", got {padding!r}')
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    extra_h, extra_w = (t % 2 for t in total)
    if extra_h or extra_w:
        x = F.pad(x, (0, extra_w, 0, extra_h))
    return x, (total[0] // 2, total[1] // 2)


def _select(x: Tensor, topology: Topology, pixels: int = 1) -> str:
    name = select(x, topology, pixels)
    # Asked here because compiled code would drop the custom backward and return zeros (torch 2.11 to 2.13).
    if name != "reference" and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "sparse products do not support torch.func transforms (grad, vmap, jvp, ...): "
            'use torch.autograd, or use_backend("reference")'
        )
    return name


class _Observe(torch.autograd.Function):
    """Identity that shows a layer's input and output gradient to its growth scorer in the backward.

    The products of `_autograd` do that themselves, derivatives of their gradients included.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, ticket: Tensor, conf: list[int]) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, ticket)
        ctx.conf = conf
        return y.clone()  # a view would forbid an in-place activation behind the layer

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, ticket = ctx.saved_tensors
        _ops.observe(ticket, x, dy, ctx.conf, not torch.is_grad_enabled())
        return dy, None, None, None
