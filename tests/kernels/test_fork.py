"""Forked and spawned processes (drill D30), each scenario in a process of its own: a hang is a failure."""

from __future__ import annotations

import os

import pytest

COMMON = """
import os, signal, sys, time
import torch
import sparse_kernels as sk

generator = torch.Generator().manual_seed(0)
topology = sk.Topology.random((256, 256), 0.2, generator=generator)
values = torch.randn(topology.nnz, generator=generator, requires_grad=True)
x = torch.randn(256, 256, generator=generator)
conv = sk.Topology.random((32, 32, 3, 3), 0.2, generator=generator)
filters = torch.randn(conv.nnz, generator=generator, requires_grad=True)
image = torch.randn(4, 32, 16, 16, generator=generator)

def work():
    with sk.use_backend("cpu"):
        y = sk.functional.linear(x, values, topology)
        z = sk.functional.conv2d(image, filters, conv, padding=1)
        (dvalues,) = torch.autograd.grad(y, values, torch.ones_like(y))
        (dfilters,) = torch.autograd.grad(z, filters, torch.ones_like(z))
    return [t.detach() for t in (y, z, dvalues, dfilters)]

def products():  # the operators alone: torch's own parallel operations hang in a forked child
    with torch.no_grad(), sk.use_backend("cpu"):
        y = sk.functional.linear(x, values, topology)
        return y, sk.functional.conv2d(image, filters, conv, padding=1)

def same(a, b):
    return all(bool((p.numpy() == q.numpy()).all()) for p, q in zip(a, b, strict=True))
"""

LOADER = """
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 20
    def __getitem__(self, i):
        return same(work(), wanted)

if __name__ == "__main__":
    torch.set_num_threads(2)
    wanted = work()
    options = {"num_workers": 2, "multiprocessing_context": "fork", "timeout": 30}
    loader = torch.utils.data.DataLoader(Data(), batch_size=5, **options)
    for epoch in range(5):
        for batch in loader:
            assert bool(batch.all())
    assert same(work(), wanted)
    print("right")
"""

BARE = """
torch.set_num_threads(2)
wanted = [t.clone() for t in products()]
work()
for attempt in range(20):
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            code = 0 if same(products(), wanted) else 4
        except RuntimeError:
            code = 5  # an error is allowed, a hang is not
        finally:
            os._exit(code)
    deadline = time.monotonic() + 5
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            sys.exit(f"child {attempt} hangs")
        time.sleep(0.002)
    if os.waitstatus_to_exitcode(status) not in (0, 5):
        sys.exit(f"child {attempt}: status {os.waitstatus_to_exitcode(status)}")
assert same(products(), wanted)
print("right")
"""

SPAWN = """
import multiprocessing

def child(queue):
    queue.put([t.tolist() for t in work()])

if __name__ == "__main__":
    torch.set_num_threads(2)
    wanted = [t.tolist() for t in work()]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == wanted
    process.join(30)
    assert process.exitcode == 0
    print("right")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.parametrize(("name", "body"), [("loader", LOADER), ("bare", BARE), ("spawn", SPAWN)])
def test_processes(name, body, run_script):
    assert run_script(COMMON, body, timeout=90).strip() == "right", name
