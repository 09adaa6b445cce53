"""CUDA graphs and compiled code under a topology that changes (D44), and updates without synchronisation."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import drill_cases as dc
import pytest
import torch
from product_cases import gpu_topology

import rigl
import sparse_kernels as sk
from sparse_kernels import testing
from sparse_kernels.rewiring import rewire_


@contextmanager
def no_synchronisation(device):
    """Raise where the host waits for the device."""
    if device != "cuda":
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def update(topology, values, generator, turn):
    """Exchange a third of the blocks, on the device and by way of the host in turn, and draw values anew."""
    if turn % 2:
        update_on_device(topology, values, generator)
    else:
        update_by_host(topology, generator)
    values.copy_(torch.randn(values.shape, generator=generator))


def update_on_device(topology, values, generator):
    """Blocks take over slots: value order is not the order of positions any more."""
    sizes = (topology.n_blocks, topology.n_blocks, topology.rows * topology.cols)
    drop, active, scores = (torch.rand(n, generator=generator).to(values.device) for n in sizes)
    yes = torch.ones((), dtype=torch.bool, device=values.device)
    rewire_(topology, drop, active, None, scores, topology.n_blocks // 3, yes, (values,))


def update_by_host(topology, generator):
    total, count = topology.rows * topology.cols, topology.n_blocks
    active = topology.positions().cpu()
    free = torch.ones(total, dtype=torch.bool)
    free[active] = False
    free = free.nonzero().flatten()
    k = min(count // 3, free.numel())
    drop = torch.randperm(count, generator=generator)[:k]
    grow = free[torch.randperm(free.numel(), generator=generator)[:k]]
    topology.update_(drop, grow)


@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("pattern", ["uniform", "empty_rows", "one"])
def test_a_graph_captured_before_updates_replays_right_after_them(device, block, pattern):
    """Also the weight gradient, whose chunks are counted for the worst case."""
    if device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    generator = torch.Generator().manual_seed(0)
    side = 8 * block
    topology = testing.random_topology((side, side), pattern, 0.3, block, generator=generator)
    x, dy = (torch.randn(1000, side, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    values = torch.randn(topology.values_shape, generator=generator).to(device, torch.bfloat16)
    case = dc.Case(f"block {block}, {pattern}", x, values, gpu_topology(topology, device), None, dy)
    x, values = x.requires_grad_(), values.requires_grad_()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(2):
            dc.gradients(case, x, values)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = dc.gradients(case, x, values)
    addresses = [t.data_ptr() for t in (case.topology.index, values)]
    for turn in range(6):
        if turn:
            with torch.no_grad():
                update(case.topology, values, generator, turn)
        for result in captured.values():
            result.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        case.values = values.detach()
        dc.check_half(case, captured)
        assert not dc.same_bits(captured, dc.gradients(case, x, values)), f"turn {turn}: unlike eager"
    case.topology.validate()
    assert addresses == [t.data_ptr() for t in (case.topology.index, values)]


def net(device, dtype):
    torch.manual_seed(0)
    side = 256 if device == "cuda" else 64
    layers = [dc.layer(device, side, side, b, 0.4, dtype=dtype) for b in (16, 32)]
    return torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1]), side


def batches(count, side, device, dtype):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(128, side, generator=generator).to(device, dtype) for _ in range(count)]


def train(device, steps, delta_t, graphed):
    """A whole RigL training, on one stream: the first hook settles where gradients are accumulated."""
    if device != "cuda":
        return train_here(device, steps, delta_t, None)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = train_here(device, steps, delta_t, stream if graphed else None)
    torch.cuda.synchronize()
    return found


def train_here(device, steps, delta_t, stream):
    """With a stream the step is a graph; a batch that an update is due on runs eagerly, scored."""
    dtype = torch.float32
    model, side = net(device, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    method = rigl.RigL(model, optimizer, t_end=10**4, delta_t=delta_t, grad_accumulation=1)
    x = torch.zeros(128, side, device=device, dtype=dtype)
    loss = torch.zeros((), device=device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def forward_backward():
        optimizer.zero_grad(set_to_none=False)
        with sk.use_backend("triton"):
            found = (model(x) - x).square().mean()
        found.backward()
        loss.copy_(found.detach())

    run, losses = forward_backward, []
    for batch in batches(steps, side, device, dtype):
        x.copy_(batch)
        due = method.step_count % delta_t == 0 and not method.updated
        if stream is not None and run is forward_backward and not due:
            run = capture(forward_backward, stream)
        (forward_backward if due else run)()
        optimizer.step()
        assert method.updated == due
        losses.append(loss.clone())
    assert method.updates > steps // (delta_t + 2)
    return [torch.stack(losses), *model.state_dict().values()]


def capture(call, stream):
    """The call as a graph; it has been made before, so that all is compiled."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def test_a_whole_training_by_graphs_is_the_eager_one(device):
    eager = train(device, dc.few(device, 60, 8), 5, graphed=False)
    again = train(device, dc.few(device, 60, 8), 5, graphed=device == "cuda")
    for a, b in zip(eager, again, strict=True):
        assert torch.equal(a, b)


def test_an_update_does_not_wait_for_the_device(device):
    model, side = net(device, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    method = rigl.RigL(model, optimizer, t_end=10**4, delta_t=1, schedule="constant", grad_accumulation=1)
    index = [layer.topology.index.data_ptr() for layer in (model[0], model[2])]
    before = model[0].topology.positions().sort().values
    for turn, x in enumerate(batches(dc.few(device, 20, 6), side, device, torch.float32)):
        with sk.use_backend("triton"), no_synchronisation(device if turn > 2 else "cpu"):
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
    assert method.updates > 2
    for layer in (model[0], model[2]):
        layer.topology.validate()
    assert not torch.equal(model[0].topology.positions().sort().values, before), "nothing was exchanged"
    assert index == [layer.topology.index.data_ptr() for layer in (model[0], model[2])]


def test_d44_compiled_code_follows_fifty_updates(device):
    """`fullgraph`, one compilation in all, results as eager."""
    model, side = net(device, torch.float32)
    x = batches(1, side, device, torch.float32)[0]
    generator = torch.Generator().manual_seed(2)
    compilations = []
    inner = "inductor" if device == "cuda" else "aot_eager"

    def counting(graph, inputs):
        compilations.append(graph)
        return torch._dynamo.lookup_backend(inner)(graph, inputs)

    def gradients(function):
        model.zero_grad()
        y = function(x)
        y.square().mean().backward()
        return [y.detach(), *(p.grad.clone() for p in model.parameters())]

    torch._dynamo.reset()
    with warnings.catch_warnings(), sk.use_backend("triton"):
        warnings.simplefilter("ignore")  # inductor's own
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counting)
        for turn in range(dc.few(device, 51, 5)):
            if turn:
                with torch.no_grad():
                    for layer in (model[0], model[2]):
                        update(layer.topology, layer.values.data, generator, turn)
            for a, b in zip(gradients(compiled), gradients(model), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    assert len(compilations) == 1, f"{len(compilations)} compilations"
