"""Derivatives and operator registration (drill D04)."""

from __future__ import annotations

import random

import kernel_cases as kc
import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

import sparse_kernels as sk
from sparse_kernels import _ops, testing


def small_case(kind, seed):
    """A float64 case small enough for numerical derivatives; some empty, some not contiguous."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    block = rng.choice(((1, 1), (1, 1), (2, 2), (1, 3), (4, 2)))
    pattern = rng.choice(testing.PATTERNS)
    batch = rng.choice((0, 1, 2, 4))

    def fill(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    if kind == "linear":
        out, inner = (b * rng.randint(0 if b == 1 else 1, 4) for b in block)
        topology = testing.random_topology((out, inner), pattern, 0.4, block, 1, generator)
        x, conf = fill(batch, inner), None
        if rng.random() < 0.4:
            x = fill(inner, batch).t()
    else:
        groups = rng.choice((1, 2))
        kernel = rng.choice(((1, 1), (2, 2), (1, 3), (3, 2)))
        conf = tuple((rng.randint(low, 2), rng.randint(low, 2)) for low in (1, 0, 1))
        out, inner = (b * rng.randint(1, 2) for b in block)
        topology = testing.random_topology(
            (groups * out, inner, *kernel), pattern, 0.4, block, groups, generator
        )
        x = fill(batch, groups * inner, 5, 6)
        if rng.random() < 0.4:
            x = x.contiguous(memory_format=torch.channels_last)
        elif rng.random() < 0.4:
            x = fill(batch, groups * inner, 5, 12)[..., ::2]
    values = fill(topology.nnz) if block == (1, 1) else fill(topology.n_blocks, *block)
    if rng.random() < 0.3:
        values = fill(*values.shape[:-1], 2 * values.shape[-1])[..., ::2]
    bias = fill(topology.shape[0]) if rng.random() < 0.6 else None
    return kc.Case(f"{kind} {seed}: {topology}, batch {batch}", x, values, topology, bias, x, conf)


@pytest.mark.parametrize("kind", list(kc.KINDS))
def test_gradients_match_numerical_derivatives(kind):
    for seed in range(50):
        case = small_case(kind, seed)
        inputs = [t.detach().requires_grad_() for t in (case.x, case.values, case.bias) if t is not None]

        def function(x, values, bias=None, case=case):
            return case.forward(x, values, bias)

        with sk.use_backend("cpu"):
            assert torch.autograd.gradcheck(function, tuple(inputs)), case.name


@pytest.mark.parametrize("kind", list(kc.KINDS))
@pytest.mark.parametrize("wanted", ["x", "values", "bias"])
def test_only_what_is_asked_for_is_differentiated(kind, wanted):
    case = kc.cases(kind, torch.float64, 1, 3).__next__()
    tensors = {"x": case.x, "values": case.values, "bias": torch.randn(case.topology.shape[0]).double()}
    tensors = {k: t.detach().requires_grad_(k == wanted) for k, t in tensors.items()}
    with sk.use_backend("cpu"):
        case.forward(**tensors).sum().backward()
    for name, t in tensors.items():
        assert (t.grad is not None) == (name == wanted)
    assert tensors[wanted].grad.shape == tensors[wanted].shape


@pytest.mark.parametrize("backend", ["cpu", "dense"])
@pytest.mark.parametrize("kind", list(kc.KINDS))
def test_second_derivatives_match_numerical_ones(kind, backend):
    for seed in range(10):
        case = small_case(kind, seed)
        inputs = [t.detach().requires_grad_() for t in (case.x, case.values, case.bias) if t is not None]

        def function(x, values, bias=None, case=case):
            return case.forward(x, values, bias).sin()

        with sk.use_backend(backend):
            assert torch.autograd.gradgradcheck(function, tuple(inputs)), case.name


@pytest.mark.parametrize("backend", ["cpu", "dense", "reference"])
@pytest.mark.parametrize("kind", list(kc.KINDS))
def test_a_penalty_on_the_input_gradient_reaches_the_values(kind, backend):
    """Here dY needs no gradient: the second derivative must not be lost for that."""
    case = small_case(kind, 3)
    x, values = case.x.detach().requires_grad_(), case.values.detach().requires_grad_()
    with sk.use_backend(backend):
        (dx,) = torch.autograd.grad(case.forward(x, values, None).sum(), x, create_graph=True)
        dx.square().sum().backward()
    weight = case.topology.to_dense(case.values).requires_grad_()
    y = x @ weight.t() if case.conf is None else F.conv2d(x, weight, None, *case.conf, case.topology.groups)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    dx.square().sum().backward()
    expected = case.topology.gather(weight.grad)
    assert expected.abs().max() > 0.1
    testing.assert_normwise(values.grad, expected, name=case.name)


@pytest.mark.parametrize("kind", list(kc.KINDS))
def test_an_update_between_forward_and_backward_is_noticed(kind):
    generator = torch.Generator().manual_seed(0)
    shape = (6, 8) if kind == "linear" else (6, 8, 3, 3)
    topology = sk.Topology.random(shape, 0.3, generator=generator)
    x = torch.randn((2, 8) if kind == "linear" else (2, 8, 5, 5), generator=generator)
    values = torch.randn(topology.nnz, requires_grad=True)
    with sk.use_backend("cpu"):
        y = getattr(sk.functional, "linear" if kind == "linear" else "conv2d")(x, values, topology)
    dropped = topology.positions()[:1]
    free = next(p for p in range(48) if p not in topology.positions().tolist())
    assert int(dropped) != free
    topology.update_(torch.tensor([0]), torch.tensor([free]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_only_what_a_gradient_reads_is_kept_and_guarded():
    """As with nn.Linear: a frozen weight does not keep the input, a plain input not the weight."""
    generator = torch.Generator().manual_seed(0)
    layer = sk.SparseLinear(16, 24, density=0.3, generator=generator)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 16, generator=generator))
        assert {id(t) for t in kept} & {id(layer.values)} == set()
        kept.clear()
        layer.values.requires_grad_(False)
        x = torch.randn(3, 16, generator=generator, requires_grad=True)
        h = x * 1
        y = layer(h)
        assert all(t.data_ptr() != h.data_ptr() for t in kept)
    h.add_(1)  # not read by the backward
    y.sum().backward()
    assert x.grad is not None
    layer.values.requires_grad_(True)
    y = layer(torch.randn(3, 16, generator=generator))
    with torch.no_grad():
        layer.values.mul_(0.9)
    y.sum().backward()
    assert layer.values.grad is not None


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on the first use of forward mode
def test_forward_mode_is_refused_by_name(frozen):
    """Without a word the tangent would be lost."""
    layer = sk.SparseLinear(16, 24, density=0.3).requires_grad_(not frozen)
    with forward_ad.dual_level(), torch.set_grad_enabled(not frozen):
        x = forward_ad.make_dual(torch.randn(3, 16), torch.ones(3, 16))
        with pytest.raises(NotImplementedError, match="forward mode"):
            layer(x)


# the operators themselves: autograd stands outside, so samples carry no requires_grad -----------


def operator_samples(kind):
    for seed in range(20):
        case = small_case(kind, seed)
        dtype = torch.float32 if seed % 2 else torch.float64
        layout = torch.channels_last if kind == "conv" and seed % 3 == 0 else torch.contiguous_format
        x = case.x.to(dtype).contiguous(memory_format=layout)
        values, topology = case.values.to(dtype).contiguous(), case.topology
        bias = None if case.bias is None else case.bias.to(dtype)
        grid = (topology.index, topology.rows, topology.cols)
        conf = ()
        if case.conf is not None:
            conf = ([*topology.shape[2:]], *([*pair] for pair in case.conf), topology.groups)
        forward = (x, values, bias, *grid, *conf)
        run = _ops.linear_forward if kind == "linear" else _ops.conv2d_forward
        dy = torch.randn_like(run(*forward))
        need_x, need_values, need_bias = (seed % 4 != 1, seed % 5 != 2, seed % 3 != 2)
        if kind == "linear":
            operands = (x if need_values else None, values if need_x else None)
            yield forward, (dy, *operands, *grid, [*values.shape], need_bias)
        else:
            yield forward, (dy, x, values, *grid, *conf, need_x, need_values, need_bias)


UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("kind", list(kc.KINDS))
def test_operators_are_registered_correctly(kind):
    forward, backward = (
        (_ops.linear_forward, _ops.linear_backward)
        if kind == "linear"
        else (_ops.conv2d_forward, _ops.conv2d_backward)
    )
    for sample in operator_samples(kind):
        for operator, args in zip((forward, backward), sample, strict=True):
            torch.library.opcheck(operator, args, test_utils=UTILITIES)


@pytest.mark.parametrize("kind", list(kc.KINDS))
def test_exported_operators_carry_their_derivatives(kind):
    operator = _ops.linear if kind == "linear" else _ops.conv2d
    for (x, values, *rest), _ in operator_samples(kind):
        args = (x.requires_grad_(), values.requires_grad_(), *rest)
        torch.library.opcheck(operator, args, test_utils=UTILITIES)


def test_topology_operators_declare_what_they_write():
    topology = sk.Topology.random((6, 9), 0.3, generator=torch.Generator().manual_seed(0))
    grid = (topology.rows, topology.cols, topology.groups, topology._plans)
    utilities = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(_ops.index_build, (topology.positions(), *grid), test_utils=utilities)
    drop = torch.tensor([0, 3])
    grow = topology.positions()[drop]
    args = (topology.index, topology.n_blocks, *grid, drop, grow)
    torch.library.opcheck(_ops.index_update, args, test_utils=utilities)
    scores, active = torch.rand(2, 9), torch.zeros(topology.n_blocks)
    state = _ops.growth_state(scores, 3)
    args = (scores, 0, topology.index, topology.n_blocks, *grid, active, state, 3)
    torch.library.opcheck(_ops.growth_scan, args, test_utils=utilities)
    torch.library.opcheck(_ops.growth_best, (scores, state, 6, 9, 3), test_utils=utilities)
    values = torch.rand(topology.n_blocks)
    args = (values, topology.index, topology.n_blocks, *grid, 2)
    torch.library.opcheck(_ops.weakest, args, test_utils=utilities)
    args = (drop, grow, values, grow + 1, torch.rand(2))
    torch.library.opcheck(_ops.exchange, args, test_utils=utilities)
    torch.library.opcheck(_ops.reordered, (values, torch.arange(topology.n_blocks)), test_utils=utilities)
    torch.library.opcheck(_ops.all_finite, (values,), test_utils=utilities)
