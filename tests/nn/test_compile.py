"""torch.compile with fullgraph, torch.export, functorch transforms."""

from __future__ import annotations

import warnings

import pytest
import torch

import sparse_kernels as sk


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        sk.SparseConv2d(3, 8, 3, padding=1, stride=2, density=0.3),
        torch.nn.ReLU(),
        sk.SparseConv2d(8, 8, (3, 2), padding="same", density=0.3, block_size=4),
        torch.nn.Flatten(),
        sk.SparseLinear(8 * 4 * 4, 16, density=0.1),
        torch.nn.ReLU(),
        sk.SparseLinear(16, 8, density=0.3, block_size=(2, 4)),
    )


def gradients(function, model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def update(layer):
    topology = layer.topology
    free = torch.ones(topology.rows * topology.cols, dtype=torch.bool)
    free[topology.positions()] = False
    layer.update_topology(torch.tensor([0, 2]), free.nonzero().flatten()[-2:])


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's own
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager_also_after_updates(backend, dynamo):
    """Index arrays change in place under the compiled graph: results must follow, without a recompilation."""
    model, x = net(), torch.randn(2, 3, 8, 8)
    if backend == "inductor":  # compiles C++: the Linear half will do
        model, x = model[4:], torch.randn(2, 8 * 4 * 4)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counting)
    assert_close(gradients(compiled, model, x), gradients(model, model, x))
    for _ in range(5):
        for layer in model:
            if isinstance(layer, sk.nn.SparseLayer):
                update(layer)
        assert_close(gradients(compiled, model, x), gradients(model, model, x))
    assert len(graphs) == 1, f"{len(graphs)} compilations"


def test_compiled_inference_and_autocast(dynamo):
    model, x = net().eval(), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, theirs = compiled(x), model(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("training", [True, False])
def test_export_with_a_dynamic_batch(training, dynamo):
    model = net().train(training)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(4, 3, 8, 8),), dynamic_shapes=({0: batch},))
    for n in (1, 4, 9):
        x = torch.randn(n, 3, 8, 8)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)
    names = {str(node.target) for node in program.graph.nodes}
    assert any("sparse_kernels" in name for name in names), "the sparse products are not in the graph"


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_can_be_trained(strict, dynamo):
    """Every parameter gets its gradient, those before a sparse layer too."""
    model, x = net(), torch.randn(4, 3, 8, 8)
    module = torch.export.export(model, (x,), strict=strict).module()
    wanted, got = gradients(model, model, x), gradients(module, module, x)
    assert len(got) == len(wanted) > 2
    assert_close(got, wanted)


@pytest.mark.parametrize("backend", ["dense", "reference"])
def test_other_backends_compile_too(backend, dynamo):
    model, x = net(), torch.randn(2, 3, 8, 8)
    with sk.use_backend(backend):
        wanted = gradients(model, model, x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(gradients(compiled, model, x), wanted)


def test_functional_transforms_are_refused_and_never_silently_zero(dynamo):
    topology = sk.Topology.random((6, 8), 0.5, generator=torch.Generator().manual_seed(0))
    x, values = torch.randn(3, 8), torch.randn(topology.nnz)

    def loss(v):
        return sk.functional.linear(x, v, topology).square().sum()

    leaf = values.clone().requires_grad_()
    loss(leaf).backward()
    for transform, argument in ((torch.func.grad(loss), values), (torch.vmap(loss), values[None])):
        with pytest.raises(RuntimeError, match="torch.func transforms"):
            transform(argument)
    with pytest.raises(Exception, match="torch.func transforms|Observed exception"):
        torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)(values)
    with sk.use_backend("reference"):
        torch.testing.assert_close(torch.func.grad(loss)(values), leaf.grad)


def test_activation_checkpointing():
    model, x = net(), torch.randn(2, 3, 8, 8)

    def recomputed(inputs):
        return torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=False)

    for a, b in zip(gradients(recomputed, model, x), gradients(model, model, x), strict=True):
        assert torch.equal(a, b)
