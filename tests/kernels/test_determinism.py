"""The same bits every time, for any number of threads (drill D11)."""

from __future__ import annotations

import hashlib
import random

import kernel_cases as kc
import pytest
import torch

import sparse_kernels as sk
from sparse_kernels import testing


def big_cases():
    """Work enough that every product is shared out among four threads."""
    generator = torch.Generator().manual_seed(0)
    for block in ((1, 1), (4, 4), (8, 8), (16, 16), (16, 8)):
        topology = testing.random_topology((768, 640), "skew", 0.2, block, generator=generator)
        shape = (topology.nnz,) if block == (1, 1) else (topology.n_blocks, *block)
        x, dy = torch.randn(150, 640, generator=generator), torch.randn(150, 768, generator=generator)
        values, bias = torch.randn(shape, generator=generator), torch.randn(768, generator=generator)
        yield kc.Case(f"linear {block}", x, values, topology, bias, dy)
    for block, groups in (((1, 1), 1), ((8, 4), 1), ((1, 1), 2)):
        topology = testing.random_topology((96, 64, 3, 3), "skew", 0.2, block, groups, generator)
        shape = (topology.nnz,) if block == (1, 1) else (topology.n_blocks, *block)
        x = torch.randn(9, 64 * groups, 14, 14, generator=generator)
        values, bias = torch.randn(shape, generator=generator), torch.randn(96, generator=generator)
        dy = torch.randn(9, 96, 14, 14, generator=generator)
        case = kc.Case(f"conv {block} x{groups}", x, values, topology, bias, dy, ((1, 1), (1, 1), (1, 1)))
        yield case


def digest(results):
    sha = hashlib.sha256()
    for value in results.values():
        sha.update(value.contiguous().numpy().tobytes())
    return sha.hexdigest()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", list(big_cases()), ids=lambda c: c.name)
def test_threads_and_repeats_do_not_change_a_bit(case, threads):
    threads(1)
    first = kc.run(case)
    assert not kc.check_bounds(case, first)
    wanted = digest(first)
    for count in (2, 3, 4):
        threads(count)
        assert digest(kc.run(case)) == wanted, f"{case.name}: {count} threads"
    for repeat in range(50):
        threads(1 + repeat % 4)
        assert digest(kc.run(case)) == wanted, f"{case.name}: repeat {repeat}"


@pytest.mark.parametrize("case", list(big_cases()), ids=lambda c: c.name)
def test_a_gradient_alone_has_the_bits_it_has_among_others(case, threads):
    """What is not asked for is not computed, by other kernels: the order of the sums stays."""
    threads(1)
    together = kc.run(case)
    for count in (1, 2, 3):
        threads(count)
        for name in kc.GRADIENTS:
            alone = kc.run(case, wanted=(name,))[name]
            assert torch.equal(alone, together[name]), f"{case.name}: {name} alone with {count} threads"


def large_cases(kind, count):
    """Random cases with work enough for several threads, counted at their density."""
    for seed in range(10_000):
        if kind == "conv":
            case = kc.conv_case(seed, torch.float32)
        else:
            rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
            block = rng.choice(((1, 1), (1, 1), *kc.BLOCKS))
            out, inner = (rng.randint(200, 700) // b * b for b in block)
            topology = testing.random_topology((out, inner), "skew", 0.2, block, generator=generator)
            shape = (topology.nnz,) if block == (1, 1) else (topology.n_blocks, *block)
            values = torch.randn(shape, generator=generator)
            x, dy = (torch.randn(rng.randint(20, 300), n, generator=generator) for n in (inner, out))
            batch = min(len(x), len(dy))
            case = kc.Case(f"linear {seed} {topology}", x[:batch], values, topology, None, dy[:batch])
        if case.topology.nnz * case.dy.numel() / max(1, case.topology.shape[0]) > 2_500_000:
            yield case
            count -= 1
            if count == 0:
                return
    raise AssertionError("too few large cases")


@pytest.mark.parametrize("kind", list(kc.KINDS))
def test_random_shapes_do_not_depend_on_the_thread_count(kind, threads, monkeypatch):
    """How a product is cut into tiles may follow the threads; the order of its sums may not."""
    monkeypatch.setattr(kc, "MAX_WORK", 60_000_000)
    for case in large_cases(kind, 40):
        threads(1)
        wanted = kc.run(case)
        for count in (2, 3, 4):
            threads(count)
            for name, value in kc.run(case).items():
                assert torch.equal(value, wanted[name]), f"{case.name}: {name} with {count} threads"


@pytest.mark.parametrize("kind", list(kc.KINDS))
def test_automatic_means_our_kernels_where_they_win(kind):
    """At 2 % density "auto" must be the CPU kernels, bit for bit, and not the oracle."""
    generator = torch.Generator().manual_seed(1)
    shape = (256, 512) if kind == "linear" else (64, 64, 3, 3)
    topology = sk.Topology.random(shape, 0.02, generator=generator)
    x = torch.randn((64, 512) if kind == "linear" else (4, 64, 12, 12), generator=generator)
    values = torch.randn(topology.nnz, generator=generator)
    conf = None if kind == "linear" else kc.CONF
    dy = torch.randn((64, 256) if kind == "linear" else (4, 64, 10, 10), generator=generator)
    case = kc.Case(kind, x, values, topology, None, dy, conf)
    called = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Spy():
        results = kc.run(case, "auto")
    assert any("sparse_kernels" in name for name in called), called
    assert digest(results) == digest(kc.run(case, "cpu"))
