"""Other ways to train a sparse layer on the CPU, as modules that hold the weights of one of ours.

torch.sparse is always there. SparseLab and SparseProp (the extra `rivals`) are raced when they are installed;
nothing here needs them.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sparse_kernels as sk


class TorchCSR(nn.Module):
    """The strongest stock path: int32 CSR products both ways, `sampled_addmm` for the weights' gradient.

    The transpose's indices are made once, as ours are; its values are collected in every step, as a
    training loop has to.
    """

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        csr = dense.weight.detach().to_sparse_csr()
        rows = torch.repeat_interleave(torch.arange(csr.shape[0]), csr.crow_indices().diff())
        self.order = (csr.col_indices() * csr.shape[0] + rows).argsort()
        back = torch.sparse_coo_tensor(torch.stack([csr.col_indices(), rows]), csr.values(), csr.shape[::-1])
        back = back.coalesce().to_sparse_csr()
        self.forth = (csr.crow_indices().int(), csr.col_indices().int(), csr.shape)
        self.back = (back.crow_indices().int(), back.col_indices().int(), back.shape)
        self.values = nn.Parameter(csr.values().clone())
        self.bias = nn.Parameter(dense.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + b`."""
        return _CSRProducts.apply(x, self.values, self.bias, self)  # type: ignore[no-any-return]


class _CSRProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor, layer: TorchCSR) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.layer = layer
        return (_csr(layer.forth, values) @ x.t()).t().add(bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, values = ctx.saved_tensors
        layer = ctx.layer
        dx = dvalues = None
        if ctx.needs_input_grad[0]:
            dx = (_csr(layer.back, values[layer.order]) @ dy.t()).t()
        if ctx.needs_input_grad[1]:
            dvalues = torch.sparse.sampled_addmm(_csr(layer.forth, values), dy.t(), x, beta=0.0).values()
        return dx, dvalues, dy.sum(0) if ctx.needs_input_grad[2] else None, None


def _csr(index: tuple[Tensor, Tensor, Any], values: Tensor) -> Tensor:
    return torch.sparse_csr_tensor(*index[:2], values, index[2], check_invariants=False)


def _sparselab(dense: nn.Linear) -> nn.Module:
    """SparseLab's layer on our mask: it draws its own otherwise."""
    lab = importlib.import_module("sparselab")
    layout = importlib.import_module("sparselab.layout")
    layer: Any = lab.SparseLinear(dense.in_features, dense.out_features, sparsity=0.99)
    layer._csr = layout.from_dense(dense.weight.detach().clone(), padding_ratio=0.2)
    layer._values = nn.Parameter(
        torch.from_numpy(importlib.import_module("numpy").asarray(layer._csr.values))
    )
    layer.bias.data.copy_(dense.bias.detach())
    return layer  # type: ignore[no-any-return]


def rivals_of(layer: sk.SparseLinear | sk.SparseConv2d, installed: bool = True) -> dict[str, nn.Module]:
    """Modules with the layer's weights, by name. Blocks have no rival that trains.

    Args:
        layer: of single weights in float32, or there are none.
        installed: also those that are not torch's own, if they are installed.
    """
    if layer.topology.is_bsr or layer.values.dtype != torch.float32:
        return {}
    dense = layer.to_dense()
    makers: dict[str, Callable[[], nn.Module]] = {}
    if isinstance(dense, nn.Linear):
        makers["torch.sparse"] = lambda: TorchCSR(dense)
    if installed and isinstance(dense, nn.Linear) and has("sparselab"):
        makers["SparseLab"] = lambda: _sparselab(dense)
    if installed and has("sparseprop"):
        if isinstance(dense, nn.Linear):
            linear = importlib.import_module("sparseprop.modules.linear")
            makers["SparseProp"] = lambda: linear.SparseLinear.from_dense(dense)
        else:
            # Two ways to lay out the work; which one is faster depends on the layer.
            conv = importlib.import_module("sparseprop.modules.conv2d")
            makers["SparseProp (B)"] = lambda: conv.SparseConv2d.from_dense(dense, False)
            makers["SparseProp (ON)"] = lambda: conv.SparseConv2d.from_dense(dense, True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse CSR is in beta
        return {name: make() for name, make in makers.items()}


def has(package: str) -> bool:
    """Whether it is installed and can be loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(package)
        except ImportError:
            return False
    return True
