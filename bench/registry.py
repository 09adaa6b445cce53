"""What is measured: one entry for each kind of layer, with its dense rivals and the sizes worth knowing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import sparse_kernels as sk

DENSITIES = (0.2, 0.1, 0.05, 0.02)
BREAK_EVEN = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # densities among which the dense layer starts to win


@dataclass(frozen=True)
class Case:
    """One layer shape.

    Attributes:
        name: what the table shows.
        dense: builds the dense layer.
        input_shape: shape of a batch.
        multiply_adds: of the dense forward, for the whole batch.
        kind: the row of the table of targets it belongs to ("" if none).
    """

    name: str
    dense: Callable[[], nn.Linear | nn.Conv2d]
    input_shape: tuple[int, ...]
    multiply_adds: int
    kind: str = ""

    def sparse(self, density: float, block_size: int) -> sk.SparseLinear | sk.SparseConv2d:
        """The layer with random positions, values of a dense one."""
        dense = self.dense()
        layer = sk.SparseLinear if isinstance(dense, nn.Linear) else sk.SparseConv2d
        return layer.from_dense(dense, density=density, block_size=block_size)

    def rivals(self) -> dict[str, tuple[nn.Module, Tensor]]:
        """Dense layers with inputs in each memory format that torch has a fast path for."""
        x = torch.randn(self.input_shape)
        if len(self.input_shape) == 2:
            return {"dense": (self.dense(), x)}
        last = torch.channels_last
        return {
            "dense NCHW": (self.dense(), x),
            "dense channels_last": (self.dense().to(memory_format=last), x.to(memory_format=last)),
        }


def _linear(batch: int, inputs: int, outputs: int, kind: str = "") -> Case:
    name = f"{batch} x {inputs} -> {outputs}"
    return Case(name, lambda: nn.Linear(inputs, outputs), (batch, inputs), batch * inputs * outputs, kind)


def _conv(batch: int, inputs: int, outputs: int, size: int, kernel: int, stride: int = 1) -> Case:
    out = size // stride
    macs = batch * inputs * outputs * kernel * kernel * out * out
    taps = f"{kernel}x{kernel}" + (f" s{stride}" if stride > 1 else "")
    name = f"{batch} x {inputs} -> {outputs}, {taps}, {size}x{size}"
    return Case(
        name,
        lambda: nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2),
        (batch, inputs, size, size),
        macs,
        f"conv {taps}",
    )


SUITES: dict[str, tuple[Case, ...]] = {
    "linear": (
        _linear(256, 1024, 1024, "linear"),
        _linear(1024, 768, 3072, "linear"),
        _linear(128, 512, 256, "small linear"),
    ),
    "conv2d": (
        _conv(64, 64, 64, 32, 3),
        _conv(64, 128, 128, 16, 3),
        _conv(64, 256, 256, 8, 3),
        _conv(64, 256, 256, 16, 1),
        _conv(64, 64, 128, 32, 3, stride=2),
    ),
    # Every part once, in a moment: for trying out the benchmark, not for figures.
    "linear-tiny": (_linear(8, 32, 48),),
    "conv2d-tiny": (_conv(2, 16, 32, 6, 3, stride=2),),
}
