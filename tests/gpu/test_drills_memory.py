"""Memory on the device: peaks and leaks (D21), running out of it (D22), and compute-sanitizer (D41)."""

from __future__ import annotations

import gc
import warnings

import drill_cases as dc
import pytest
import sanitizer
import torch

import rigl
import sparse_kernels as sk


class Training:
    """A layer with RigL on it; every other batch is an update."""

    def __init__(self, device, block, side, tokens, delta_t=1, dtype=torch.float32):
        self.device = device
        self.layer = dc.layer(device, side, side, block, 0.2, dtype=dtype)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.01, momentum=0.9)
        self.method = rigl.RigL(
            self.layer, self.optimizer, t_end=10**6, delta_t=delta_t, schedule="constant", grad_accumulation=1
        )
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(tokens, side, generator=generator).to(device, dtype)

    def step(self):
        self.optimizer.zero_grad(set_to_none=False)
        with sk.use_backend("triton"):
            self.layer(self.x).square().mean().backward()
        self.optimizer.step()

    def state(self):
        """A copy of everything that an update changes."""
        moments = [
            t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)
        ]
        return [t.detach().clone() for t in (self.layer.topology.index, self.layer.values, *moments)]


def peak(call):
    """Bytes that a call takes besides what there is."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("block", [16, 64])
def test_d21_peaks(device, block):
    """An update takes no more than one dense gradient besides, an ordinary step nothing of that size."""
    if device != "cuda":
        pytest.skip("the CPU's allocator has no such statistics")
    side, tokens = 4096, 64
    training = Training(device, block, side, tokens)
    for _ in range(4):
        training.step()
    steps = {True: [], False: []}
    for _ in range(8):
        taken = peak(training.step)
        steps[training.method.updated].append(taken)
    dense_gradient, activations = 4 * side * side, 8 * 4 * side * tokens
    ordinary = activations + 3 * training.layer.values.nbytes
    assert ordinary < dense_gradient, "the limit would let a dense gradient pass"
    assert max(steps[False]) <= ordinary
    assert max(steps[True]) - max(steps[False]) <= 1.1 * dense_gradient


def test_d21_no_leak(device):
    """As much memory after 2,000 updates as after ten."""
    training = Training(device, 16, dc.few(device, 256, 64), 64)

    def updates(count):
        goal = training.method.updates + count
        while training.method.updates < goal:
            training.step()
        gc.collect()
        return torch.cuda.memory_allocated() if device == "cuda" else len(gc.get_objects())

    before = updates(dc.few(device, 10, 2))
    after = updates(dc.few(device, 2000, 3))
    assert after - before <= (1 << 20 if device == "cuda" else 200)
    training.layer.topology.validate()


def test_d22_out_of_memory_leaves_the_old_state_or_the_new(device):
    """The allocator refuses at 20 thresholds: an error to catch, no torn state, and training goes on."""
    if device != "cuda":
        pytest.skip("needs the GPU's allocator")
    training = Training(device, 16, 2048, 4096)
    for _ in range(5):
        training.step()
    while training.method.updated:
        training.step()
    # The next step is an update. Room for a share of what it takes, from nothing to nearly all.
    needed = peak(training.step)
    training.step()
    total, refused = torch.cuda.get_device_properties(0).total_memory, 0
    try:
        for share in range(20):
            torch.cuda.empty_cache()
            room = torch.cuda.memory_reserved() + needed * share / 20
            before = training.state()
            torch.cuda.set_per_process_memory_fraction(min(1.0, room / total))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", rigl.SkippedUpdateWarning)
                try:
                    training.step()
                except torch.OutOfMemoryError:
                    refused += 1
                    after = training.state()
                    if torch.equal(after[0], before[0]):
                        same = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
                        assert same, f"threshold {share}: the old topology with other values or moments"
                finally:
                    torch.cuda.set_per_process_memory_fraction(1.0)
                gc.collect()
                training.layer.topology.validate()
                while True:  # memory is there again
                    training.step()
                    if not training.method.updated:
                        break
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert refused > 0, "no threshold was low enough"
    training.step()
    assert bool(training.layer.values.isfinite().all())


# compute-sanitizer: how its answers are read; `make gpu` runs it on all cases -----------------------


FAKE = """#!/bin/sh
{body}
"""


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ('echo "cases: 60 of 60"; echo "========= ERROR SUMMARY: 0 errors"', "pass"),
        ('echo "cases: 12 of 60"; echo "========= ERROR SUMMARY: 0 errors"', "pass"),
        (
            'echo "cases: 60 of 60"; echo "= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"',
            "pass",
        ),
        ('echo "========= Invalid __global__ read"; echo "= ERROR SUMMARY: 3 errors"; exit 86', "FAILED"),
        ('echo "cases: 60 of 60"; echo "========= ERROR SUMMARY: 3 errors"', "FAILED"),
        ('echo "Traceback: AssertionError"; echo "========= ERROR SUMMARY: 0 errors"; exit 1', "FAILED"),
        ('echo "Error: Device not supported. Please refer to the documentation"; exit 1', "not run"),
        ('echo "========= Target application returned an error"; exit 255', "not run"),
        ('echo "========= ERROR SUMMARY: 0 errors"', "not run"),
        ("exit 0", "not run"),
        ("exec sleep 60", "not run"),
    ],
)
def test_d41_a_refusal_is_never_a_pass(tmp_path, body, verdict):
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(FAKE.format(body=body))
    fake.chmod(0o755)
    outcome = sanitizer.run("memcheck", seconds=1, program=str(fake), grace=1)
    assert outcome.verdict == verdict, outcome
    assert outcome.detail


def test_d41_no_program_no_pass():
    assert sanitizer.run("memcheck", seconds=1, program="/nowhere/compute-sanitizer").verdict == "not run"


def test_d41_the_cases_themselves_are_right(device):
    """Without the sanitizer: what it would look at runs, and is compared with the dense product."""
    done = sanitizer.run_cases(device, count=dc.few(device, 60, 6), seconds=60)
    assert done == dc.few(device, 60, 6)
