"""Several streams and threads on shared weights, one of them changing the topology of another layer (D32)."""

from __future__ import annotations

import threading

import drill_cases as dc
import pytest
import torch
from product_cases import gpu_topology

import sparse_kernels as sk
from sparse_kernels import testing


def shared_case(device, block, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens, side = (2048, 1024) if device == "cuda" else (40, 64)
    topology = testing.random_topology((side, side), "skew", 0.2, block, generator=generator)
    dtype = dc.half_dtypes(device)[0]
    x, dy = (torch.randn(tokens, side, generator=generator).to(device, dtype) for _ in range(2))
    values = torch.randn(topology.values_shape, generator=generator).to(device, dtype)
    return dc.Case(f"block {block}", x, values, gpu_topology(topology, device), None, dy)


@pytest.mark.parametrize("block", [16, 64])
def test_d32_two_streams(device, block):
    """Products on two streams at a time, on the same weights, have the bits of products alone."""
    case = shared_case(device, block)
    first = dc.run(case)
    if device != "cuda":
        assert not dc.same_bits(first, dc.run(case))
        return
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for _ in range(100):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(dc.run(case))
    torch.cuda.synchronize()
    for number, results in enumerate(found):
        assert not dc.same_bits(first, results), f"call {number}"


def test_d32_eight_threads(device):
    """1,000 calls each on shared weights, every thread on its own stream, while another layer is rewired."""
    if device != "cuda":
        pytest.skip("Triton's interpreter has one grid for all threads")
    cases = [shared_case(device, block) for block in (16, 32, 64, 128)]
    wanted = [dc.run(case) for case in cases]
    other = shared_case(device, 32, seed=9)
    torch.cuda.synchronize()
    failures, done = [], threading.Event()

    def work(number):
        case, first = cases[number % 4], wanted[number % 4]
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for call in range(1000):
                    with sk.use_backend("triton"):
                        y = sk.functional.linear(case.x, case.values, case.topology)
                    if call % 50 == 0 and not torch.equal(y, first["y"]):
                        failures.append(f"thread {number}, call {call}: another output")
                    if call % 100 == 0 and (names := dc.same_bits(first, dc.run(case))):
                        failures.append(f"thread {number}, call {call}: another {names}")
        except Exception as error:  # in a thread it would be lost
            failures.append(f"thread {number}: {error!r}")

    def rewire():
        topology, generator = other.topology, torch.Generator().manual_seed(0)
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                while not done.is_set():
                    free = torch.ones(topology.rows * topology.cols, dtype=torch.bool)
                    free[topology.positions().cpu()] = False
                    grow = free.nonzero().flatten()[:3]
                    topology.update_(
                        torch.randperm(topology.n_blocks, generator=generator)[: len(grow)], grow
                    )
        except Exception as error:
            failures.append(f"update: {error!r}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    updater = threading.Thread(target=rewire)
    for thread in (*threads, updater):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    updater.join()
    torch.cuda.synchronize()
    assert not failures, failures[:5]
    other.topology.validate()
    for case, first in zip(cases, wanted, strict=True):
        assert not dc.same_bits(first, dc.run(case)), f"{case.name}: other bits afterwards"
