"""bfloat16 and float16 on the CPU: read exactly, computed in float32, written rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparse_kernels as sk
from sparse_kernels import _autograd, _ops
from sparse_kernels.functional import linear

DTYPES = (torch.bfloat16, torch.float16)
SHAPES = [  # tokens, in, out, density: ragged ones, empty rows, no weight, all of them, no token
    (256, 128, 64, 0.2),
    (1, 16, 16, 0.3),
    (33, 100, 57, 0.05),
    (131, 300, 70, 0.1),
    (200, 1024, 1030, 0.02),
    (5, 7, 3, 0.0),
    (70, 33, 65, 1.0),
    (0, 9, 5, 0.5),
]


def case(dtype: torch.dtype, tokens: int, inputs: int, outputs: int, density: float):
    generator = torch.Generator().manual_seed(tokens + inputs)
    topology = sk.Topology.random((outputs, inputs), density, generator=generator)
    sizes = ((tokens, inputs), (topology.nnz,), (outputs,), (tokens, outputs))
    return topology, [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def step(topology: sk.Topology, x: Tensor, values: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (x, values, bias)]
    y = linear(leaves[0], leaves[1], topology, leaves[2])
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def exact(topology: sk.Topology, x: Tensor, values: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    weight = topology.to_dense(values)
    return x @ weight.T + bias, dy @ weight, topology.gather(dy.T @ x), dy.sum(0)


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    nan = got.isnan() & wanted.isnan()
    equal = got.view(torch.int16) == wanted.view(torch.int16)
    return got.dtype == wanted.dtype and bool((nan | equal | ((got == 0) & (wanted == 0))).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_is_read_exactly_and_rounded_as_torch_does(dtype):
    """One weight, so that a product is one multiplication, exact in float32."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    topology = sk.Topology(torch.tensor([0]), (1, 1))
    for factor in (1.0, -1.0, 3.0, 2.0**-10, 2.0**10, 1.7e-3, 0.7):
        values = torch.tensor([factor]).to(dtype)
        wanted = (numbers.float() * values.float()).to(dtype)
        assert same_bits(linear(numbers.view(-1, 1), values, topology).view(-1), wanted), factor


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_those_of_float32_rounded_once(dtype, shape):
    """Bit for bit: of a sum over hundreds of tokens only the end is rounded."""
    topology, operands = case(dtype, *shape)
    wanted = step(topology, *(t.float() for t in operands))
    for name, got, full in zip(
        ("y", "dx", "dvalues", "dbias"), step(topology, *operands), wanted, strict=True
    ):
        assert same_bits(got, full.to(dtype)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_the_rounding_of_a_float64_oracle(dtype):
    topology, operands = case(dtype, *SHAPES[3])
    wanted, reach = (exact(topology, *(f(t.double()) for t in operands)) for f in (torch.clone, torch.abs))
    ulp = torch.finfo(dtype).eps / 2
    for got, true, terms in zip(step(topology, *operands), wanted, reach, strict=True):
        # Rounded once, after sums in float32 whose terms have this magnitude.
        allowed = 1.001 * ulp * true.abs() + 2**-20 * terms + 2**-25
        assert bool(((got.double() - true).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_or_not_contiguous(dtype):
    topology, (x, values, bias, dy) = case(dtype, *SHAPES[2])
    x[0, 0], x[1, -1], dy[2, 0], dy[3, 1] = torch.nan, torch.inf, -torch.inf, torch.nan
    wanted = step(topology, *(t.float() for t in (x, values, bias, dy)))
    strided = (
        x.T.contiguous().T,
        values.repeat_interleave(2)[::2],
        bias.flip(0).flip(0),
        dy.T.contiguous().T,
    )
    for got, full in zip(step(topology, *strided), wanted, strict=True):
        assert same_bits(got, full.to(dtype))
        assert torch.equal(got.isnan(), full.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype):
    topology, operands = case(dtype, 512, 600, 700, 0.1)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(step(topology, *operands))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("only", ["dx", "dvalues", "dbias"])
def test_one_gradient_alone(only):
    topology, (x, values, bias, dy) = case(torch.bfloat16, *SHAPES[3])
    wanted = dict(zip(("dx", "dvalues", "dbias"), step(topology, x, values, bias, dy)[1:], strict=True))
    leaf = {"dx": x, "dvalues": values, "dbias": bias}[only].requires_grad_()
    (got,) = torch.autograd.grad(linear(x, values, topology, bias), leaf, dy)
    assert torch.equal(got, wanted[only])


def test_autocast_hands_reduced_operands_to_the_kernels(monkeypatch):
    seen = []

    def spy(*args):
        seen.append(args[0].dtype)
        return _ops.linear_forward(*args)

    monkeypatch.setitem(_autograd._FORWARD, "linear", spy)
    layer = sk.nn.SparseLinear(32, 24, density=0.3)
    x = torch.randn(40, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert seen == [torch.bfloat16]
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), layer.to_dense()(x), atol=0.05)
    y.float().square().sum().backward()
    assert layer.values.grad is not None
    assert layer.values.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_keep_their_contract(dtype):
    topology, (x, values, bias, dy) = case(dtype, *SHAPES[2])
    grid = (topology.index, topology.rows, topology.cols)
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(_ops.linear_forward, (x, values, bias, *grid), test_utils=utilities)
    torch.library.opcheck(
        _ops.linear_backward, (dy, x, values, *grid, [topology.nnz], True), test_utils=utilities
    )


def test_blocks_are_refused_by_the_operator_and_converted_by_the_function():
    topology = sk.Topology.random((32, 32), 0.5, block_size=8)
    x, values = torch.randn(4, 32).bfloat16(), torch.randn(topology.values_shape).bfloat16()
    with pytest.raises(RuntimeError, match="single weights"):
        _ops.linear_forward(x, values, None, topology.index, topology.rows, topology.cols)
    assert linear(x, values, topology).dtype == torch.bfloat16
