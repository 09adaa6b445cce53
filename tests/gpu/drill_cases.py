"""Random block-sparse products for the drills on a GPU, from a seed, with float32 and dense references.

On a CPU the same goes through Triton's interpreter: fewer cases, and no bfloat16, which it does not know.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from product_cases import Case, gpu_topology, oracle, run
from torch import Tensor
from torch.nn import functional as F

import sparse_kernels as sk
from sparse_kernels import testing

__all__ = ["Case", "oracle", "run"]  # for the drills, from here

SQUARE = ((16, 16), (32, 32), (64, 64), (128, 128))
# Every block is as many kernels to compile: all for one dtype, a small and a large one for the others.
BLOCKS = {torch.bfloat16: (*SQUARE, (128, 32), (16, 64), (64, 16), (32, 128))}
FEWER = ((32, 32), (64, 64), (128, 16))
FORWARD_ERROR, BACKWARD_ERROR = 2, 3  # times the error of torch's dense product in the same dtype
TF32 = 2.0**-9  # of |X| |W|: both operands lose 13 of their 23 bits


def half_dtypes(device: str) -> tuple[torch.dtype, ...]:
    return (torch.bfloat16, torch.float16) if device == "cuda" else (torch.float16,)


def few(device: str, on_a_gpu: int, interpreted: int) -> int:
    """How many cases: the interpreter takes a hundred times as long."""
    return on_a_gpu if device == "cuda" else interpreted


def layer(device: str, inputs: int, outputs: int, block: int, density: float, **kwargs) -> sk.SparseLinear:
    """A layer as it is on a GPU."""
    made = sk.SparseLinear(
        inputs,
        outputs,
        density=density,
        block_size=block,
        generator=torch.Generator().manual_seed(0),
        **kwargs,
    )
    if device == "cuda":
        return made.to(device)
    made.topology = made.topology._with_layout("gpu")
    return made


def random_case(seed: int, dtype: torch.dtype, device: str, integers: bool = False) -> Case:
    """Any block, pattern and number of tokens; `integers`: in -2..2."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    limit = 9 if device == "cuda" else 6
    block = rng.choice(BLOCKS.get(dtype, FEWER) if device == "cuda" else BLOCKS[torch.bfloat16])
    shape = tuple(b * rng.randint(1, max(1, limit * 32 // b)) for b in block)
    pattern = rng.choice(testing.PATTERNS)
    topology = testing.random_topology(
        shape, pattern, rng.choice((0.05, 0.3, 0.7)), block, generator=generator
    )
    tokens = rng.choice((0, 1, rng.randint(2, 70), rng.choice((255, 256, 257)) if device == "cuda" else 33))

    def draw(*size: int) -> Tensor:
        if integers:
            return torch.randint(-2, 3, size, generator=generator).to(device, dtype)
        return torch.randn(size, generator=generator).to(device, dtype)

    bias = draw(shape[0]) if rng.random() < 0.5 else None
    name = f"seed {seed}: {tokens} tokens, {pattern} {topology}, {dtype}, bias {bias is not None}"
    return Case(
        name,
        draw(tokens, shape[1]),
        draw(*topology.values_shape),
        gpu_topology(topology, device, seed),
        bias,
        draw(tokens, shape[0]),
    )


def gradients(case: Case, x: Tensor, values: Tensor, backend: str = "triton") -> dict[str, Tensor]:
    """What `run` gives, on these leaves."""
    bias = None if case.bias is None else case.bias.detach().requires_grad_()
    leaves = {"dx": x, "dvalues": values} | ({} if bias is None else {"dbias": bias})
    with sk.use_backend(backend):
        y = sk.functional.linear(x, values, case.topology, bias)
        found = torch.autograd.grad(y, list(leaves.values()), case.dy)
    return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}


def dense(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same by torch's dense products, in `dtype`."""
    x, dy = case.x.to(dtype), case.dy.to(dtype)
    w = case.topology.to_dense(case.values.to(dtype))
    bias = None if case.bias is None else case.bias.to(dtype)
    found = {"y": F.linear(x, w, bias), "dx": dy @ w, "dvalues": case.topology.gather(dy.t() @ x)}
    if bias is not None:
        found["dbias"] = dy.sum(0)
    return found


@contextmanager
def float32_precision(name: str) -> Iterator[None]:
    """ "highest" (strict) or "high" (tf32 allowed)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_half(case: Case, found: dict[str, Tensor]) -> None:
    """The rule of bfloat16 and float16: errors against those of torch's dense products in the same dtype."""
    with float32_precision("highest"):
        expected, rivals = dense(case, torch.float32), dense(case, case.x.dtype)
    for name, actual in found.items():
        factor = FORWARD_ERROR if name == "y" else BACKWARD_ERROR
        assert_within(f"{case.name}: {name}", actual, expected[name], rivals[name], factor)


def assert_within(name: str, actual: Tensor, expected: Tensor, rival: Tensor, factor: float) -> None:
    """The largest error is at most `factor` times the rival's, or one unit in the last place."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    ulp = torch.finfo(actual.dtype).eps * expected.abs().max().item()
    error, granted = ((t.float() - expected).abs().max().item() for t in (actual, rival))
    assert error <= factor * max(granted, ulp), (
        f"{name}: error {error:.3g}, dense {granted:.3g}, ulp {ulp:.3g}"
    )


def check_float32(case: Case, found: dict[str, Tensor], tf32: bool) -> None:
    """Entry by entry, against float64."""
    expected, sizes = oracle(case), oracle(case, absolute=True)
    for name, actual in found.items():
        bound = TF32 if tf32 and name != "dbias" else None
        testing.assert_componentwise(
            actual, expected[name], sizes[name], bound=bound, name=f"{case.name}: {name}"
        )


def guarded(tensor: Tensor, margin: int) -> tuple[Tensor, Tensor]:
    """A contiguous copy between NaN, and the whole of that memory."""
    memory = torch.full(
        (tensor.numel() + 2 * margin,), float("nan"), dtype=tensor.dtype, device=tensor.device
    )
    inner = memory[margin : margin + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return inner, memory


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the results that differ."""
    return [name for name in a if not torch.equal(a[name], b[name])]
