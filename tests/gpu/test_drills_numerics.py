"""Right numbers: by error rules (D01), on integers (D02), in poisoned memory (D07), far out (D09c)."""

from __future__ import annotations

from dataclasses import replace

import drill_cases as dc
import pytest
import torch
from torch.nn import functional as F

import sparse_kernels as sk
from sparse_kernels import testing


def test_d01_half_precision(device):
    """At most twice (gradients: three times) the error of torch's dense product in the same dtype."""
    for dtype in dc.half_dtypes(device):
        for seed in range(dc.few(device, 300, 50)):
            case = dc.random_case(seed, dtype, device)
            dc.check_half(case, dc.run(case))


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_d01_float32(device, precision):
    """Strict as torch is by default, tf32 where it is allowed; componentwise."""
    with dc.float32_precision(precision):
        for seed in range(1000, 1000 + dc.few(device, 300, 30)):
            case = dc.random_case(seed, torch.float32, device)
            dc.check_float32(case, dc.run(case), tf32=precision == "high")


def test_d01_a_wrong_row_is_seen(device):
    """The rules have teeth: two lost rows, a lost block and a lost last token."""
    dtype = dc.half_dtypes(device)[0]
    cases = (dc.random_case(seed, dtype, device) for seed in range(10_000))
    case = next(c for c in cases if c.x.shape[0] > 2 and c.topology.n_blocks > 1 and c.bias is None)
    for name, at in (("y", (-1,)), ("dx", (slice(0, 2),)), ("dvalues", (-1,))):
        found = dc.run(case)
        found[name][at] = 0
        with pytest.raises(AssertionError, match=name):
            dc.check_half(case, found)


def test_d02_integers_are_exact(device):
    """Sums of products of small integers have no rounding error but that of the result's dtype."""
    dtypes = (*dc.half_dtypes(device), torch.float32)
    for seed in range(dc.few(device, 510, 60)):
        case = dc.random_case(seed, dtypes[seed % len(dtypes)], device, integers=True)
        found, expected = dc.run(case), dc.dense(case, torch.float64)
        for name, actual in found.items():
            assert torch.equal(actual, expected[name].to(actual.dtype)), f"{case.name}: {name}"


def test_d07_nan_around_operands_and_in_fresh_memory(device):
    """Nothing is read or written beside the operands, and no output keeps what its memory held."""
    for seed in range(dc.few(device, 500, 40)):
        case = dc.random_case(seed, dc.half_dtypes(device)[0], device)
        memories = []
        for name in ("x", "values", "dy", "bias"):
            if getattr(case, name) is None:
                continue
            # One element beside the boundary of 16 bytes that TMA wants, or on it.
            inner, memory = dc.guarded(getattr(case, name), 64 + seed % 2)
            case = replace(case, **{name: inner})
            memories.append((name, memory, memory.clone()))
        x, values = case.x.requires_grad_(), case.values.requires_grad_()
        with testing.poisoned_memory():
            found = dc.gradients(case, x, values)
        for name, actual in found.items():
            assert bool(actual.isfinite().all()), f"{case.name}: {name} is not finite"
        for name, memory, before in memories:
            same = torch.equal(memory.detach().view(torch.int16), before.view(torch.int16))
            assert same, f"{case.name}: the memory around {name} was written to"
        dc.check_half(replace(case, x=x.detach(), values=values.detach()), found)


@pytest.mark.parametrize("block", [16, 64])
def test_d09c_outputs_beyond_two_to_the_31(device, block):
    """The last 4,096 of 2^31 + 4,096 outputs, and of as many input gradients."""
    if device != "cuda":
        pytest.skip("takes 4.3 GB an output")
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of free memory")
    wide, narrow, dtype = 4096, 64, torch.bfloat16
    tokens = 2**31 // wide + 1
    generator = torch.Generator().manual_seed(0)
    topology = sk.Topology.random((wide, narrow), 0.5, block, generator=generator, device=device)
    values = torch.randn(topology.values_shape, generator=generator).to(device, dtype)
    x = torch.randn(tokens, narrow, device=device, dtype=dtype)
    with sk.use_backend("triton"):
        y = sk.functional.linear(x, values, topology)
    assert y.numel() == 2**31 + 4096
    w = topology.to_dense(values)
    dc.assert_within("y", y[-1:], x[-1:].float() @ w.float().t(), F.linear(x[-1:], w), dc.FORWARD_ERROR)
    del y
    back = sk.Topology.random((narrow, wide), 0.5, block, generator=generator, device=device)
    values = torch.randn(back.values_shape, generator=generator).to(device, dtype)
    dx = torch.ops.sparse_kernels.linear_backward(
        x, None, values, back.index, back.rows, back.cols, list(values.shape), False
    )[0]
    assert dx.shape == (tokens, wide)
    w = back.to_dense(values)
    dc.assert_within("dx", dx[-1:], x[-1:].float() @ w.float(), x[-1:] @ w, dc.BACKWARD_ERROR)
