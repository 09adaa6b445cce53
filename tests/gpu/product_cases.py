"""Sparse layers as a GPU holds them, with values in any slots, and their float64 oracle."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

import sparse_kernels as sk
from sparse_kernels import testing

BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128), (128, 32), (16, 64), (64, 16), (32, 128))


@dataclass(frozen=True)
class Case:
    """Operands on the device. Values stand in random slots, as after updates."""

    name: str
    x: Tensor
    values: Tensor
    topology: sk.Topology
    bias: Tensor | None
    dy: Tensor


def gpu_topology(topology: sk.Topology, device: str, seed: int = 0) -> sk.Topology:
    """Laid out as on a GPU, on `device`, with the blocks in random slots."""
    moved = topology.to(device)
    moved = moved if device == "cuda" else moved._with_layout("gpu")
    if topology.block_size != (1, 1):
        slot = torch.randperm(topology.n_blocks, generator=torch.Generator().manual_seed(seed)).int()
        moved.load_arrays_(topology.row_ptr, topology.col_idx, slot)
    return moved


def case(
    seed: int,
    dtype: torch.dtype,
    device: str,
    *,
    integers: bool = False,
    block: tuple[int, int] | None = None,
) -> Case:
    """A random product from a seed: ragged tokens, patterns of every kind."""
    rng, generator = random.Random(f"gpu {seed}"), torch.Generator().manual_seed(seed)
    block = block or rng.choice(BLOCKS)
    pattern = rng.choice(("uniform", *testing.PATTERNS))
    rows, cols = rng.randint(1, 5), rng.randint(1, 6)
    tokens = rng.choice((1, 7, 64, 65, 130, 200, 256, 257, 300))
    shape = (rows * block[0], cols * block[1])
    topology = testing.random_topology(shape, pattern, rng.choice((0.2, 0.5)), block, generator=generator)

    def fill(*size: int) -> Tensor:
        if integers:
            return torch.randint(-2, 3, size, generator=generator).to(device, dtype)
        return torch.randn(size, generator=generator).to(device, dtype)

    name = f"seed {seed}: {tokens} x {shape[1]} -> {shape[0]}, block {block}, {pattern}, {dtype}"
    bias = fill(shape[0]) if rng.random() < 0.5 else None
    values = fill(topology.n_blocks, *block)
    moved = gpu_topology(topology, device, seed)
    return Case(name, fill(tokens, shape[1]), values, moved, bias, fill(tokens, shape[0]))


def run(c: Case, backend: str = "triton") -> dict[str, Tensor]:
    """Output and gradients."""
    leaves = [t.detach().requires_grad_() for t in (c.x, c.values, c.bias) if t is not None]
    with sk.use_backend(backend):
        y = sk.functional.linear(leaves[0], leaves[1], c.topology, leaves[2] if len(leaves) > 2 else None)
        grads = torch.autograd.grad(y, leaves, c.dy)
    return {"y": y.detach(), **dict(zip(("dx", "dvalues", "dbias"), grads, strict=False))}


def oracle(c: Case, absolute: bool = False) -> dict[str, Tensor]:
    """The same in float64 through the masked dense weight; of the absolute values, for error bounds."""
    x, values, dy = (t.double().abs() if absolute else t.double() for t in (c.x, c.values, c.dy))
    weight = c.topology.to_dense(values)
    y = x @ weight.t()
    found = {"dx": dy @ weight, "dvalues": c.topology.gather(dy.t() @ x)}
    if c.bias is not None:
        bias = c.bias.double().abs() if absolute else c.bias.double()
        y, found["dbias"] = y + bias, dy.sum(0)
    return {"y": y, **found}
