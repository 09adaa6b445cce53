"""The operators on CUDA tensors: unpack the index, choose the launch, allocate, launch.

Registered in `_ops.py`, which imports this module with the first product on a GPU. What the kernels do not
take goes through the dense library, as backend "dense" does.
"""

from __future__ import annotations

import bisect
import functools
import itertools

import torch
from torch import Tensor

from .. import layout
from ..backend import TRITON_BLOCKS
from ..dense import dense_linear_backward, dense_linear_forward
from ..dense import growth_norms as striped_norms
from . import growth
from .bsr_sddmm import bsr_sddmm
from .bsr_spmm import bsr_spmm
from .configs import TOKEN_BUCKETS, Config, Problem, choose, rule
from .launch import KNOWN, aligned, on_its_device

_Grads = tuple[Tensor, Tensor, Tensor]
_BLOCKS = frozenset(itertools.product(TRITON_BLOCKS, repeat=2))
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ARITHMETIC = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


@on_its_device
def linear_forward(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, rows: int, cols: int
) -> Tensor:
    """`[tokens, in]` -> `[tokens, out]`."""
    if not _takes(values.shape, values.dtype):
        return dense_linear_forward(x, values, bias, index, rows, cols)
    offsets = _offsets(index, values.shape, rows, cols)
    out = x.new_empty(x.shape[0], rows * values.shape[1])
    _spmm(x, values, bias, index, offsets, out, transposed=False)
    return out


@on_its_device
def linear_backward(
    dy: Tensor,
    x: Tensor | None,
    values: Tensor | None,
    index: Tensor,
    rows: int,
    cols: int,
    values_size: list[int],
    need_bias: bool,
) -> _Grads:
    """The gradients: dX if `values` is given, dW if `x` is, and db."""
    if not _takes(values_size, dy.dtype):
        return dense_linear_backward(dy, x, values, index, rows, cols, values_size, need_bias)
    offsets = _offsets(index, values_size, rows, cols)
    dx, dw = dy.new_empty(0), dy.new_empty(0)
    if values is not None:
        dx = dy.new_empty(dy.shape[0], cols * values_size[2])
        _spmm(dy, values, None, index, offsets, dx, transposed=True)
    if x is not None:
        dw = _sddmm(dy, x, index, offsets, values_size)
    return dx, dw, dy.sum(0) if need_bias else dy.new_empty(0)


@on_its_device
def growth_norms(x: Tensor, dy: Tensor, b_out: int, b_in: int, score: str) -> Tensor:
    """Norms of the blocks of `dY^T X`, `[out / b_out, in / b_in]` float32."""
    if not _takes((1, b_out, b_in), x.dtype) or min(*x.shape, *dy.shape) == 0:
        return striped_norms(x, dy, b_out, b_in, score)
    config = _config("growth_norms", b_out, b_in, x)
    return growth.block_norms(
        aligned(x), aligned(dy), b_out, b_in, score, config=config, precision=_precision(x)
    )


@on_its_device
def growth_candidates(
    x: Tensor, dy: Tensor, active: Tensor, k: int, guess: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A list that the k best inactive entries of `|dY^T X|` are in; see `growth.candidates`."""
    config = _config("growth_candidates", 1, 1, x)
    return growth.candidates(
        aligned(x), aligned(dy), active, k, guess, config=config, precision=_precision(x)
    )


def _takes(size: torch.Size | list[int] | tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether there are kernels for values of this size."""
    return len(size) == 3 and (size[1], size[2]) in _BLOCKS and dtype in _DTYPES


def _offsets(index: Tensor, size: torch.Size | list[int], rows: int, cols: int) -> layout.Offsets:
    found = layout.offsets(size[0], rows, cols, size[2])
    if index.numel() < found.end:
        raise ValueError(
            f"the index of {size[0]} blocks in {rows} x {cols} on a GPU must have {found.end} entries, got "
            f"{index.numel()}: it belongs to another topology or layout"
        )
    return found


def _spmm(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Tensor,
    offsets: layout.Offsets,
    out: Tensor,
    transposed: bool,
) -> None:
    if out.numel() == 0:
        return
    if values.numel() == 0 or x.numel() == 0:  # no box of an empty matrix
        out.zero_() if bias is None else out.copy_(bias.expand_as(out))
        return
    b_out, b_in = values.shape[1:]
    side, inner = (b_in, b_out) if transposed else (b_out, b_in)
    config = _config("spmm", side, inner, x, transposed)
    bias = None if bias is None else aligned(bias)
    launch_spmm(aligned(x), aligned(values), bias, index, offsets, out, transposed=transposed, config=config)


def launch_spmm(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Tensor,
    offsets: layout.Offsets,
    out: Tensor,
    *,
    transposed: bool,
    config: Config,
) -> None:
    """The kernel that `config` names; arguments as `bsr_spmm` takes them."""
    operands = (x, values, bias, index, offsets, out)
    if config.kernel == "gluon":
        from .gluon_spmm import bsr_spmm as by_gluon

        by_gluon(*operands, transposed=transposed, config=config)
        return
    bsr_spmm(*operands, transposed=transposed, config=config, precision=_precision(x))


def _sddmm(dy: Tensor, x: Tensor, index: Tensor, offsets: layout.Offsets, values_size: list[int]) -> Tensor:
    dw = x.new_empty(values_size)
    if dw.numel() == 0:
        return dw
    if x.shape[0] == 0:
        return dw.zero_()
    config = _config("sddmm", values_size[1], values_size[2], x)
    operands = (aligned(dy), aligned(x), dw, index, offsets)
    bsr_sddmm(*operands, config=config, processors=_processors(x.device), precision=_precision(x))
    return dw


def _config(op: str, out: int, inner: int, x: Tensor, transposed: bool = False) -> Config:
    arithmetic = _ARITHMETIC.get(x.dtype) or _precision(x)
    bucket = bisect.bisect_left(TOKEN_BUCKETS, x.shape[0])
    return _chosen(op, out, inner, arithmetic, bucket, transposed, x.device.index)


@functools.lru_cache(maxsize=4096)
def _chosen(
    op: str, out: int, inner: int, arithmetic: str, bucket: int, transposed: bool, device: int | None
) -> Config:
    tokens = (*TOKEN_BUCKETS, TOKEN_BUCKETS[-1] + 1)[bucket]
    name = "none" if device is None else torch.cuda.get_device_name(device)
    problem = Problem(op, out, inner, "float32" if arithmetic == "ieee" else arithmetic, tokens, transposed)
    config = choose(problem, name)
    return config if config.kernel == "triton" or KNOWN else rule(problem)


def _precision(x: Tensor) -> str:
    """Of float32 products: what torch allows its own."""
    if x.dtype != torch.float32:
        return "tf32"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _processors(device: torch.device) -> int:
    return _processor_count(device.index or 0) if device.type == "cuda" else 132


@functools.cache
def _processor_count(number: int) -> int:
    return torch.cuda.get_device_properties(number).multi_processor_count
