"""Edge cases, their full cross product, and strides of every kind (drills D05 and D06)."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import kernel_cases as kc
import pytest
import torch
from torch.nn import functional as F

import sparse_kernels as sk
from sparse_kernels import testing

LEADING = ((), (0,), (1,), (5,), (2, 0), (3, 2), (2, 1, 3), (0, 2, 2))
GRIDS = ((0, 7), (7, 0), (0, 0), (1, 1), (1, 31), (31, 1), (13, 17))


def fill(generator, *size, dtype=torch.float64):
    return torch.randn(size, generator=generator, dtype=dtype)


def run(function, *tensors):
    """Output, and gradients of a random scalar of it. Gradients must exist, however empty."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    dy = fill(torch.Generator().manual_seed(5), *y.shape).to(y.dtype)
    grads = torch.autograd.grad(y, leaves, dy)
    return [y.detach(), *grads]


def compare(ours, exact, topology, label):
    """Ours: y, dx, dvalues[, dbias]; exact: the same in float64 with the dense weight's gradient."""
    exact = [exact[0], exact[1], topology.gather(exact[2]), *exact[3:]]
    for name, a, e in zip(("y", "dx", "dvalues", "dbias"), ours, exact, strict=False):
        assert a.shape == e.shape, f"{label}: {name} {a.shape}, not {e.shape}"
        tolerance = {torch.float32: 1e-4, torch.float64: 1e-12}[a.dtype]
        assert torch.allclose(a.double(), e, rtol=tolerance, atol=tolerance), f"{label}: {name}"


@pytest.mark.parametrize("dtype", testing.NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 2500), (2500, 40), (520, 700)], ids=str)
def test_linear_across_tiles_and_blocks(shape, dtype):
    """CSR kernels take columns in tiles and rows in blocks (csrc/common/index.h): more than one of each, with
    rows that some tile, or every tile, leaves out."""
    generator = torch.Generator().manual_seed(0)
    for pattern, density in itertools.product(testing.PATTERNS, (0.003, 0.2)):
        topology = testing.random_topology(shape, pattern, density, generator=generator)
        x, dy = (fill(generator, 70, n, dtype=dtype) for n in reversed(shape))
        values, bias = (fill(generator, n, dtype=dtype) for n in (topology.nnz, shape[0]))
        case = kc.Case(f"{topology} {pattern}", x, values, topology, bias, dy)
        together = kc.run(case)
        assert not kc.check_bounds(case, together)
        for name in kc.GRADIENTS:
            assert torch.equal(kc.run(case, wanted=(name,))[name], together[name]), f"{case.name}: {name}"


@pytest.mark.parametrize("backend", ["cpu", "dense", "auto"])
@pytest.mark.parametrize("block", [(1, 1), (2, 3), (4, 4), (8, 8), (16, 16)], ids=str)
def test_linear_edges(block, backend):
    generator = torch.Generator().manual_seed(0)
    for (rows, cols), pattern in itertools.product(GRIDS, testing.PATTERNS):
        shape = (rows * block[0], cols * block[1])
        topology = testing.random_topology(shape, pattern, 0.3, block, generator=generator)
        wide = fill(generator, topology.n_blocks, *block)
        wide = wide.flatten() if block == (1, 1) else wide
        for lead, dtype, biased in itertools.product(LEADING, testing.NATIVE_DTYPES, (False, True)):
            label = f"{topology} {pattern}, x {(*lead, shape[1])}, {dtype}, bias {biased}"
            tensors = [t.to(dtype) for t in (fill(generator, *lead, shape[1]), wide)]
            tensors += [fill(generator, shape[0]).to(dtype)] if biased else []
            with sk.use_backend(backend):
                ours = run(lambda x, v, b=None, t=topology: sk.functional.linear(x, v, t, b), *tensors)
            assert ours[0].dtype == dtype, label
            assert ours[0].shape == (*lead, shape[0]), label
            tensors = [t.double() for t in tensors]
            tensors[1] = topology.to_dense(tensors[1])
            compare(ours, run(F.linear, *tensors), topology, label)


IMAGES = (  # (batch or None), height, width, kernel, stride, padding, dilation, groups
    (None, 5, 7, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (0, 5, 7, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (2, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    (3, 7, 5, (1, 3), (2, 3), (0, 2), (1, 2), 1),
    (2, 11, 3, (5, 2), (3, 1), (3, 0), (2, 1), 2),
    (1, 3, 40, (3, 3), (1, 1), (3, 3), (1, 1), 1),  # padding wider than the image is high
    (2, 4, 4, (4, 4), (1, 1), (0, 0), (1, 1), 1),  # one output pixel
)


@pytest.mark.parametrize("backend", ["cpu", "dense", "auto"])
@pytest.mark.parametrize("block", [(1, 1), (2, 3), (4, 1)], ids=str)
def test_conv_edges(block, backend):
    generator = torch.Generator().manual_seed(0)
    for image, pattern, channels in itertools.product(IMAGES, testing.PATTERNS, ((1, 1), (3, 2))):
        batch, height, width, kernel, stride, padding, dilation, groups = image
        out, inner = (n * b for n, b in zip(channels, block, strict=True))
        shape = (groups * out, inner, *kernel)
        topology = testing.random_topology(shape, pattern, 0.3, block, groups, generator)
        wide = fill(generator, topology.n_blocks, *block)
        wide = wide.flatten() if block == (1, 1) else wide
        size = (groups * inner, height, width) if batch is None else (batch, groups * inner, height, width)
        conf = (stride, padding, dilation, groups)
        for dtype, biased in itertools.product(testing.NATIVE_DTYPES, (False, True)):
            label = f"{topology} {pattern}, x {size}, {conf}, {dtype}, bias {biased}"
            tensors = [fill(generator, *size).to(dtype), wide.to(dtype)]
            tensors += [fill(generator, shape[0]).to(dtype)] if biased else []
            with sk.use_backend(backend):
                ours = run(
                    lambda x, v, b=None, t=topology, c=conf: sk.functional.conv2d(x, v, t, b, *c), *tensors
                )
            assert ours[0].dtype == dtype, label
            tensors = [t.double() for t in tensors]
            tensors[1] = topology.to_dense(tensors[1])
            exact = run(lambda x, w, b=None, c=conf: F.conv2d(x, w, b, *c), *tensors)
            compare(ours, exact, topology, label)


# strides --------------------------------------------------------------------------------------


def strided(tensor, kind, rng):
    """The same values (or, for "expanded", the first slice repeated) behind other strides."""
    if kind == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "step":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if kind == "outer step":
        wide = tensor.new_full((2 * tensor.shape[0], *tensor.shape[1:]), torch.nan)
        wide[::2] = tensor
        return wide[::2]
    if kind == "sliced":
        wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 5), torch.nan)
        wide[..., 3:-2] = tensor
        return wide[..., 3:-2]
    if kind == "offset":
        offset = rng.randint(1, 15)
        flat = tensor.new_full((offset + tensor.numel(),), torch.nan)
        flat[offset:] = tensor.flatten()
        return flat[offset:].view(tensor.shape)
    if kind == "expanded":
        return tensor[:1].expand_as(tensor) if tensor.shape[0] else tensor
    if kind == "scalar":
        return tensor.new_full((), 0.75).expand_as(tensor)
    if kind == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


KINDS = ("plain", "transposed", "step", "outer step", "sliced", "offset", "expanded", "scalar")


@pytest.mark.parametrize("kind", list(kc.KINDS))
def test_strides_change_nothing(kind):
    choices = KINDS if kind == "linear" else (*KINDS, "channels_last", "channels_last")
    for seed, case in enumerate(kc.cases(kind, torch.float32, 200, 2000)):
        rng = random.Random(seed)
        kinds = [rng.choice(choices), rng.choice(choices), rng.choice(("plain", "step", "offset"))]
        x, dy = (strided(t, k, rng) for t, k in zip((case.x.contiguous(), case.dy), kinds, strict=False))
        values = strided(case.values, kinds[2], rng)
        bias = None if case.bias is None else strided(case.bias, kinds[2], rng)
        odd = replace(case, x=x, dy=dy, values=values, bias=bias)
        plain = replace(
            case,
            x=x.contiguous(),
            dy=dy.contiguous(),
            values=values.contiguous(),
            bias=None if bias is None else bias.contiguous(),
        )
        before = [t.clone() for t in (x, dy, values, case.topology.index)]
        ours, wanted = kc.run(odd), kc.run(plain)
        for name, value in wanted.items():
            assert torch.equal(ours[name], value), f"{case.name}: {name} with x, dy, values {kinds}"
        for now, then in zip((x, dy, values, case.topology.index), before, strict=True):
            assert torch.equal(now, then), f"{case.name}: an input was modified"
