"""No dense-sized memory, no leak (drill D21)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparse_kernels as sk
from sparse_kernels import dense
from sparse_kernels.growth import GrowthScorer


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel, self.name = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.numel() > self.numel:
                self.numel, self.name = leaf.numel(), str(func)
        return out


def layer_and_input(kind, block_size):
    generator = torch.Generator().manual_seed(0)
    if kind == "linear":
        layer = sk.SparseLinear(2048, 2048, density=0.01, block_size=block_size, generator=generator)
        return layer, torch.randn(32, 2048, generator=generator, requires_grad=True)
    layer = sk.SparseConv2d(512, 512, 3, padding=1, density=0.01, block_size=block_size, generator=generator)
    return layer, torch.randn(2, 512, 6, 6, generator=generator, requires_grad=True)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.11, whenever it is used
@pytest.mark.parametrize("block_size", [1, 8])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_an_ordinary_step_allocates_nothing_of_the_dense_size(kind, block_size):
    layer, x = layer_and_input(kind, block_size)
    dense_size = layer.topology.rows * layer.topology.cols * layer.topology.block_numel
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)

    def step():
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()

    with Largest() as largest:
        step()
    assert largest.numel < dense_size / 8, f"{largest.name} returned {largest.numel} of {dense_size} elements"
    # The dispatch mode sees what operations return; the profiler what they take from the allocator besides.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    taken = max(e.nbytes() for e in trace.profiler.kineto_results.events() if e.name() == "[memory]")
    assert taken < dense_size * 4 / 8, f"{taken} bytes at once"


@pytest.mark.parametrize("block_size", [1, 8])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_scoring_growth_holds_one_stripe_at_a_time(kind, block_size, monkeypatch):
    monkeypatch.setitem(dense._STRIPE_ELEMENTS, "cpu", 1 << 16)
    layer, x = layer_and_input(kind, block_size)
    layer.growth = GrowthScorer(layer.topology, k=100)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        layer(x).square().mean().backward()
    assert layer.growth.result().positions.numel() == 100
    sizes = [e.nbytes() for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    row = layer.topology.cols * layer.topology.block_numel
    stripe = 4 * max(1 << 16, row)
    limit = max(stripe, 4 * x.numel() * 9, 4 * 3 * layer.topology.index.numel())
    assert max(sizes) <= 1.1 * limit, f"{max(sizes)} bytes at once, a stripe has {stripe}"


def measure(body: str, run_script: Callable[..., str]) -> list[float]:
    """Run a script that prints numbers of MiB."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory cannot be reset on this platform")
    return [float(word) for word in run_script(PRELUDE, body, timeout=120).split()]


PRELUDE = """
import gc
import torch
import sparse_kernels as sk
from sparse_kernels.growth import GrowthScorer

def mib(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(key + ":"))

def reset_peak():
    gc.collect()
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    return mib("VmRSS")

generator = torch.Generator().manual_seed(0)
"""


def test_a_16384_square_layer_trains_in_less_than_300_mb(run_script):
    """Forward, backward, growth scoring and the update; a dense gradient alone would be 1 GiB."""
    (extra,) = measure(
        """
        layer = sk.SparseLinear(16384, 16384, density=0.01, generator=generator)
        x = torch.randn(64, 16384, generator=generator)
        warm = sk.SparseLinear(64, 64, density=0.1)
        warm(torch.randn(8, 64)).sum().backward()
        before = reset_peak()
        layer(x).square().mean().backward()
        layer.zero_grad()
        k = int(0.3 * layer.nnz)
        layer.growth = GrowthScorer(layer.topology, k)
        layer(x).square().mean().backward()
        found = layer.growth.result()
        layer.growth = None
        drop = layer.values.detach().abs().topk(k, largest=False).indices
        layer.update_topology(drop, found.positions)
        peak = mib("VmHWM")
        layer.topology.validate()
        print(peak - before)
        """,
        run_script,
    )
    assert extra < 300 * 1e6 / 2**20, f"{extra:.0f} MiB above the layer itself"


@pytest.mark.parametrize("block_size", [1, 4])
def test_two_thousand_updates_leak_nothing(block_size, run_script):
    (growth,) = measure(
        f"""
        torch.set_num_threads(1)
        layer = sk.SparseLinear(128, 192, density=0.1, block_size={block_size}, generator=generator)
        x = torch.randn(16, 128, generator=generator)

        def update():
            layer.growth = GrowthScorer(layer.topology, 20)
            layer(x).square().mean().backward()
            positions = layer.growth.result().positions
            layer.growth = None
            drop = torch.randperm(layer.topology.n_blocks, generator=generator)[:20]
            layer.update_topology(drop, positions)
            layer.zero_grad()

        for _ in range(300):
            update()
        before = reset_peak()
        for _ in range(2000):
            update()
        gc.collect()
        print(mib("VmRSS") - before)
        """,
        run_script,
    )
    assert growth <= 1.0, f"{growth:.2f} MiB more after 2,000 updates"
