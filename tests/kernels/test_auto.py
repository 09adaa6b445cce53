""" "auto" on the CPU: what it chooses, when it asks, and that results are right whichever it is."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

import rigl
import sparse_kernels as sk
from sparse_kernels import _ops, backend, cost


@pytest.fixture
def dense_always(monkeypatch):
    """The rule says dense for every layer that it is asked about; the list of its answers."""
    asked = []

    def rule(step):
        asked.append(step)
        return True

    monkeypatch.setattr(cost, "dense_pays", rule)
    return asked


def layer_and_input(kind, density=0.5, **options):
    torch.manual_seed(0)
    if kind == "linear":
        return sk.SparseLinear(24, 16, density=density, **options), torch.randn(6, 24)
    return sk.SparseConv2d(6, 8, 3, padding=1, density=density, **options), torch.randn(6, 6, 5, 4)


def operators(function):
    """Names of the package's operators that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        function()
    return {e.name.split("::")[1] for e in trace.events() if e.name.startswith("sparse_kernels::")}


def gradients(function, layer, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


def step(kind, density, batch, block=(1, 1), size=1024, pixels=1):
    rows, cols = size // block[0], size // block[1]
    n = round(rows * cols * density)
    return cost.CpuStep(kind, rows, cols, n, block, batch, pixels, size * pixels, size * pixels, 4)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
def test_the_rule(kind, block):
    """What no refit may change: sparse layers are sparse, nearly full ones of single weights dense."""
    pixels = 64 if kind == "conv2d" else 1
    for batch in (16, 64, 256, 1024):
        assert not cost.dense_pays(step(kind, 0.05, batch, block, pixels=pixels))
    assert cost.dense_pays(step(kind, 1.0, 256, pixels=pixels))
    never = cost.SURELY_SPARSE[kind] / 2
    assert not any(cost.dense_pays(step(kind, never, batch, block)) for batch in cost.BATCHES)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_sparse_layer_is_not_asked_about(kind, dense_always):
    layer, x = layer_and_input(kind, density=0.02)
    layer(x)
    assert not dense_always


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_the_rule_is_asked_once_for_each_size_and_dtype(kind, dense_always, monkeypatch):
    layer, x = layer_and_input(kind)
    for _ in range(3):
        layer(x)
        layer(x[:1])
    assert [s.batch for s in dense_always] == [cost.round_batch(6), 1]
    assert dense_always[0].kind == kind
    layer.double()(x.double())
    assert len(dense_always) == 3
    copy = layer.topology.clone()
    copy.choices["other"] = "cpu"
    assert "other" not in layer.topology.choices
    monkeypatch.setattr(backend, "_CHOICES", 2)
    for size in range(1, 6):
        layer(x[:size].double())
    assert len(layer.topology.choices) <= 2


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("block_size", [1, 2])
def test_training_through_the_dense_library_is_right(kind, block_size, dense_always):
    layer, x = layer_and_input(kind, block_size=block_size)
    layer, x = layer.double(), x.double()
    assert any(name.startswith("dense_") for name in operators(lambda: layer(x)))
    ours = gradients(layer, layer, x)
    with sk.use_backend("reference"):
        wanted = gradients(layer, layer, x)
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)
    dense_always.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.float()(x.float()).dtype == torch.bfloat16
    leaf, values = x.clone().requires_grad_(), layer.double().values
    (dx,) = torch.autograd.grad(layer(leaf).tanh().sum(), leaf, create_graph=True)
    (twice,) = torch.autograd.grad(dx.square().sum(), values)
    with sk.use_backend("reference"):
        (dx,) = torch.autograd.grad(layer(leaf).tanh().sum(), leaf, create_graph=True)
        (wanted_twice,) = torch.autograd.grad(dx.square().sum(), values)
    torch.testing.assert_close(twice, wanted_twice, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_rigl_updates_the_same_whatever_computes(kind, monkeypatch):
    masks = []
    for dense in (False, True):
        monkeypatch.setattr(cost, "dense_pays", lambda _, dense=dense: dense)
        layer, x = layer_and_input(kind)
        layer, x = layer.double(), x.double()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        updater = rigl.RigL(layer, optimizer, t_end=20, delta_t=2)
        for _ in range(6):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
        assert updater.updates > 0
        masks.append(layer.mask())
    assert torch.equal(*masks)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_compiled_code_takes_the_choice_as_a_constant(kind, dense_always):
    layer, x = layer_and_input(kind)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(layer, fullgraph=True, backend=counting)
        for size in (6, 5, 4, 3, 2):  # the second compiles for any up to 8
            part = x[:size]
            torch.testing.assert_close(
                gradients(compiled, layer, part), gradients(layer, layer, part), rtol=1e-5, atol=1e-5
            )
    assert len(graphs) == 2
    assert {s.batch for s in dense_always} == {8}
    torch._dynamo.reset()


def test_exported_programs_do_not_choose(dense_always):
    layer, x = layer_and_input("linear")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    for n in (1, 5, 40):
        other = torch.randn(n, 24)
        torch.testing.assert_close(program.module()(other), layer(other))
    assert _ops.linear in {node.target for node in program.graph.nodes}


def test_the_meta_device_is_not_asked_about(dense_always):
    layer, x = layer_and_input("linear")
    assert layer.to("meta")(x.to("meta")).shape == (6, 16)
    assert not dense_always


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_stays_with_the_kernels(dense_always, run_script):
    """There the dense library would wait for threads that did not come along."""
    out = run_script(
        """
        import os
        import torch
        import sparse_kernels as sk
        from sparse_kernels import cost

        cost.dense_pays = lambda step: True
        torch.set_num_threads(2)
        layer, x = sk.SparseLinear(512, 512, density=0.9), torch.randn(256, 512)
        with torch.no_grad():
            wanted = layer(x)
            pid = os.fork()
            if pid == 0:
                found = layer(x).numpy()  # torch's own comparison would wait too
                os._exit(0 if abs(found - wanted.numpy()).max() < 1e-4 else 3)
        print(os.waitpid(pid, 0)[1])
        """,
        timeout=60,
    )
    assert out.split() == ["0"]
