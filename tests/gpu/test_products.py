"""Block-sparse products by Triton kernels: all passes against float64, on shapes that break tiles."""

from __future__ import annotations

import pytest
import torch
from product_cases import BLOCKS, case, gpu_topology, oracle, run

import sparse_kernels as sk
from sparse_kernels import layout, testing
from sparse_kernels.backend import INTERPRETED
from sparse_kernels.triton import operators
from sparse_kernels.triton.bsr_sddmm import bsr_sddmm, split_tokens
from sparse_kernels.triton.configs import Config, Problem, candidates, warp_specialised


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_small_integers_are_exact(block: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    with testing.poisoned_memory():
        for seed in range(6):
            c = case(seed, dtype, device, integers=True, block=block)
            results = run(c)
            for key, expected in oracle(c).items():
                assert torch.equal(results[key].double(), expected), f"{c.name}: {key}"


@pytest.mark.parametrize("seed", range(12))
def test_float32_within_its_rounding(seed: int, device: str) -> None:
    c = case(100 + seed, torch.float32, device)
    results, expected, magnitude = run(c), oracle(c), oracle(c, absolute=True)
    for key, value in expected.items():
        testing.assert_componentwise(results[key], value, magnitude[key], name=f"{c.name}: {key}")


@pytest.mark.parametrize("pattern", testing.PATTERNS)
@pytest.mark.parametrize("block", [(16, 16), (64, 64)])
def test_every_pattern(pattern: str, block: tuple[int, int], device: str) -> None:
    shape = (4 * block[0], 3 * block[1])
    topology = gpu_topology(testing.random_topology(shape, pattern, 0.4, block), device)
    x, dy = torch.randn(70, shape[1], device=device), torch.randn(70, shape[0], device=device)
    values = torch.randn(topology.values_shape, device=device).requires_grad_()
    with testing.poisoned_memory(), sk.use_backend("triton"):
        y = sk.functional.linear(x, values, topology)
        (dvalues,) = torch.autograd.grad(y, values, dy)
    weight = topology.to_dense(values.detach())
    torch.testing.assert_close(y, x @ weight.t(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(dvalues, topology.gather(dy.t() @ x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_candidate_config(block: int, transposed: bool, device: str) -> None:
    c = case(3, torch.float16, device, integers=True, block=(block, block))
    x, expected = (c.dy, oracle(c)["dx"]) if transposed else (c.x, oracle(c)["y"])
    t = c.topology
    offsets = layout.offsets(t.n_blocks, t.rows, t.cols, block)
    bias = None if transposed else c.bias
    problem = Problem("spmm", block, block, "float16", 8192, transposed)
    specialised = [] if INTERPRETED else warp_specialised(problem)  # no interpreter knows Gluon
    for config in candidates(problem) + specialised:
        out = torch.full_like(expected, float("nan"), dtype=torch.float16)
        operators.launch_spmm(x, c.values, bias, t.index, offsets, out, transposed=transposed, config=config)
        assert torch.equal(out.double(), expected), f"{config}, {t}"


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("tokens", [1, 33, 700])
def test_split_tokens_add_up(block: int, tokens: int, device: str) -> None:
    config = Config(16, 0, 4, 2)
    topology = gpu_topology(testing.random_topology((4 * block, 3 * block), "uniform", 0.5, block), device)
    x = torch.randint(-2, 3, (tokens, 3 * block), device=device).half()
    dy = torch.randint(-2, 3, (tokens, 4 * block), device=device).half()
    splits, per_split = split_tokens(tokens, topology.n_blocks, block, config, 132)
    assert (splits > 1) == (tokens == 700)
    assert (splits - 1) * per_split < tokens <= splits * per_split
    out = torch.full(topology.values_shape, float("nan"), device=device).half()
    offsets = layout.offsets(topology.n_blocks, topology.rows, topology.cols, block)
    bsr_sddmm(dy, x, out, topology.index, offsets, config=config, processors=132)
    expected = topology.gather(dy.double().t() @ x.double())
    torch.testing.assert_close(out.double(), expected, atol=0, rtol=2**-11)


def test_after_updates(device: str) -> None:
    """Blocks move to the slots of others; products and gradients follow."""
    generator = torch.Generator().manual_seed(0)
    layer = sk.SparseLinear(96, 128, density=0.4, block_size=32, generator=generator).half()
    layer.topology = gpu_topology(layer.topology, device)
    layer = layer.to(device)
    for _ in range(3):
        n, total = layer.topology.n_blocks, layer.topology.rows * layer.topology.cols
        drop = torch.randperm(n, generator=generator)[: n // 3]
        taken = torch.zeros(total, dtype=torch.bool)
        taken[layer.topology.positions().cpu()] = True
        free = (~taken).nonzero().flatten()
        grow = free[torch.randperm(len(free), generator=generator)[: n // 3]]
        layer.update_topology(drop.to(device), grow.to(device))
        layer.topology.validate()
        x = torch.randint(-2, 3, (50, 96), device=device).half()
        with torch.no_grad():
            layer.values.copy_(torch.randint(-2, 3, layer.values.shape, generator=generator))
            layer.bias.zero_()
        with sk.use_backend("triton"):
            y = layer(x)
        assert torch.equal(y, x @ layer.dense_weight().t())


def test_second_derivatives(device: str) -> None:
    c = case(5, torch.float32, device, block=(16, 16))
    x, values = c.x[:20].clone().requires_grad_(), c.values.clone().requires_grad_()

    def penalty(backend: str) -> tuple[torch.Tensor, ...]:
        with sk.use_backend(backend):
            y = sk.functional.linear(x, values, c.topology)
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            return torch.autograd.grad(dx.square().sum(), (x, values))

    for ours, theirs in zip(penalty("triton"), penalty("reference"), strict=True):
        testing.assert_normwise(ours, theirs.double(), rtol=1e-5)


def test_a_gradient_alone_and_empty_sizes(device: str) -> None:
    c = case(2, torch.float16, device, integers=True, block=(16, 16))
    index, size = c.topology.index, list(c.values.shape)
    dx, dw, db = operators.linear_backward(
        c.dy, None, c.values, index, c.topology.rows, c.topology.cols, size, False
    )
    assert dw.numel() == 0
    assert db.numel() == 0
    assert torch.equal(dx.double(), oracle(c)["dx"])
    none = c.x[:0]
    assert operators.linear_forward(
        none, c.values, c.bias, index, c.topology.rows, c.topology.cols
    ).shape == (
        0,
        c.topology.shape[0],
    )
    args = (c.dy[:0], none, c.values, index, c.topology.rows, c.topology.cols, size, True)
    dx, dw, db = operators.linear_backward(*args)
    assert dx.shape == none.shape
    assert not dw.any()
    assert not db.any()


def test_what_kernels_do_not_take_says_why(device: str) -> None:
    with sk.use_backend("triton"):
        topology = gpu_topology(testing.random_topology((24, 24), "uniform", 0.5, 8), device)
        values = torch.randn(topology.values_shape, device=device)
        with pytest.raises(RuntimeError, match="sides of 16, 32, 64, 128"):
            sk.functional.linear(torch.randn(3, 24, device=device), values, topology)
        c = case(1, torch.float32, device, block=(16, 16))
        with pytest.raises(RuntimeError, match="float64"):
            sk.functional.linear(c.x.double(), c.values.double(), c.topology)


def test_an_index_of_another_layout_is_refused(device: str) -> None:
    c = case(1, torch.float32, device, block=(16, 16))
    short = c.topology.index[: -layout.chunk_count(c.topology.n_blocks, c.topology.rows, 16)]
    with pytest.raises(ValueError, match="belongs to another topology"):
        operators.linear_forward(c.x, c.values, None, short, c.topology.rows, c.topology.cols)


def test_misaligned_and_strided_inputs(device: str) -> None:
    c = case(4, torch.float16, device, integers=True, block=(32, 32))
    base = torch.zeros(c.x.numel() + 1, dtype=c.x.dtype, device=device)
    shifted = base[1:].view(c.x.shape).copy_(c.x)  # starts on 2 bytes: TMA wants 16
    wide = torch.zeros(c.x.shape[0], c.x.shape[1] + 3, dtype=c.x.dtype, device=device)
    strided = wide[:, 1:-2]
    strided.copy_(c.x)
    with sk.use_backend("triton"):
        for x in (shifted, strided, c.x.reshape(1, *c.x.shape)):
            y = sk.functional.linear(x, c.values, c.topology, c.bias)
            assert torch.equal(y.reshape(c.x.shape[0], -1).double(), oracle(c)["y"])
