"""Random cases of the sparse products, from a seed; their float64 oracle; and a command line.

`python kernel_cases.py d01|d02|digest FIRST COUNT` runs cases in a process of its own (the instruction set
is chosen when the extension loads) and prints the instruction set, a digest of the results and the failures.
"digest" is d02 without the comparison: equal digests make one comparison do for all.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

import sparse_kernels as sk
from sparse_kernels import testing

BIG = (255, 256, 257, 511, 1000, 1024)
BLOCKS = (
    (2, 2),
    (3, 3),
    (4, 4),
    (8, 8),
    (16, 16),
    (32, 32),
    (4, 2),
    (2, 4),
    (1, 8),
    (16, 1),
    (3, 5),
    (8, 32),
)
DENSITIES = (0.01, 0.1, 0.5)
CONF = ((1, 1), (0, 0), (1, 1))
MAX_WORK = 4_000_000  # dense multiply-adds of one case


@dataclass(frozen=True)
class Case:
    """One product: `conf` is (stride, padding, dilation) of a convolution, None for Linear."""

    name: str
    x: Tensor
    values: Tensor
    topology: sk.Topology
    bias: Tensor | None
    dy: Tensor
    conf: tuple[tuple[int, int], ...] | None = None

    def forward(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        if self.conf is None:
            return sk.functional.linear(x, values, self.topology, bias)
        return sk.functional.conv2d(x, values, self.topology, bias, *self.conf, self.topology.groups)

    def dense_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.conf is None:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, *self.conf, self.topology.groups)


# drawing --------------------------------------------------------------------------------------


def _extent(rng: random.Random, block: int, smallest: int, big: bool) -> int:
    size = rng.choice(BIG) if big else rng.choice((rng.randint(smallest, 12), rng.randint(smallest, 130)))
    return max(size // block, min(smallest, 1)) * block


def _pattern(rng: random.Random) -> tuple[str, float]:
    kind = rng.choices(
        ["uniform", "skew", "none", "one", "all", *testing.PATTERNS],
        [10, 6, 1, 2, 3, *[0.5] * len(testing.PATTERNS)],
    )[0]
    return kind, rng.choice(DENSITIES)


def _filler(seed: int, dtype: torch.dtype, integers: bool) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def fill(*size: int) -> Tensor:
        if integers:
            return torch.randint(-2, 3, size, generator=generator).to(dtype)
        return torch.randn(size, generator=generator, dtype=dtype)

    return fill


def linear_case(seed: int, dtype: torch.dtype = torch.float32, integers: bool = False) -> Case:
    rng, fill = random.Random(f"linear {seed}"), _filler(seed, dtype, integers)
    block = (1, 1) if rng.random() < 0.5 else rng.choice(BLOCKS)
    out, inner = (_extent(rng, b, 0, rng.random() < 0.04) for b in block)
    batch = rng.randint(0, 70) if rng.random() < 0.95 else rng.choice((96, 128, 129, 192, 257))
    if batch * out * inner > MAX_WORK:
        batch = MAX_WORK // (out * inner)
    kind, density = _pattern(rng)
    topology = testing.random_topology(
        (out, inner), kind, density, block, generator=torch.Generator().manual_seed(seed)
    )
    values = fill(topology.n_blocks, *block) if block != (1, 1) else fill(topology.nnz)
    bias = fill(out) if rng.random() < 0.5 else None
    name = f"linear seed {seed}: {tuple((batch, inner, out))}, block {block}, {kind} {density}, {dtype}"
    return Case(name, fill(batch, inner), values, topology, bias, fill(batch, out))


def conv_case(seed: int, dtype: torch.dtype = torch.float32, integers: bool = False) -> Case:
    rng, fill = random.Random(f"conv {seed}"), _filler(seed, dtype, integers)
    block = (1, 1) if rng.random() < 0.5 else rng.choice(BLOCKS)
    groups = rng.choice((1, 1, 1, 2, 3))
    kernel = rng.choice(((1, 1), (3, 3), (3, 3), (1, 3), (5, 2), (2, 2), (4, 1)))
    stride, dilation = ((rng.choice(c), rng.choice(c)) for c in ((1, 1, 2, 3), (1, 1, 2)))
    padding = (rng.randint(0, 3), rng.randint(0, 3))
    out, inner = (_extent(rng, b, 1, False) // groups // b * b or b for b in block)
    size = [
        max(rng.randint(1, 17), d * (k - 1) + 1 - 2 * p)
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    if rng.random() < 0.1:
        size[rng.randint(0, 1)] = rng.randint(30, 70)
    work = groups * out * inner * kernel[0] * kernel[1] * size[0] * size[1]
    batch = min(rng.choice((0, 1, 1, 2, 3, 5, 9, 33)), max(1, MAX_WORK // work))
    kind, density = _pattern(rng)
    shape = (groups * out, inner, *kernel)
    topology = testing.random_topology(
        shape, kind, density, block, groups, torch.Generator().manual_seed(seed)
    )
    values = fill(topology.n_blocks, *block) if block != (1, 1) else fill(topology.nnz)
    bias = fill(groups * out) if rng.random() < 0.5 else None
    oh, ow = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    x, dy = fill(batch, groups * inner, *size), fill(batch, groups * out, oh, ow)
    if rng.random() < 0.4:
        x = x.contiguous(memory_format=torch.channels_last)
    name = (
        f"conv seed {seed}: x {tuple(x.shape)}, weight {shape}, groups {groups}, block {block}, "
        f"stride {stride}, padding {padding}, dilation {dilation}, {kind} {density}, {dtype}"
    )
    return Case(name, x, values, topology, bias, dy, (stride, padding, dilation))


KINDS = {"linear": linear_case, "conv": conv_case}


def cases(
    kind: str, dtype: torch.dtype, count: int, first: int = 0, integers: bool = False
) -> Iterator[Case]:
    for seed in range(first, first + count):
        yield KINDS[kind](seed, dtype, integers)


# running --------------------------------------------------------------------------------------


GRADIENTS = ("dx", "dvalues", "dbias")


def run(case: Case, backend: str = "cpu", wanted: tuple[str, ...] = GRADIENTS) -> dict[str, Tensor]:
    """Output y and the gradients wanted."""
    inputs = dict(zip(GRADIENTS, (case.x, case.values, case.bias), strict=True))
    leaves = {k: t.detach().requires_grad_(k in wanted) for k, t in inputs.items() if t is not None}
    with sk.use_backend(backend):
        y = case.forward(leaves["dx"], leaves["dvalues"], leaves.get("dbias"))
        names = [k for k in leaves if k in wanted]
        grads = torch.autograd.grad(y, [leaves[k] for k in names], case.dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def dense_run(case: Case) -> dict[str, Tensor]:
    """The same through torch's dense library, in the dtype of the case."""
    bias = case.bias
    leaves = [case.x.detach(), case.topology.to_dense(case.values.detach())] + (
        [] if bias is None else [bias.detach()]
    )
    leaves = [t.requires_grad_() for t in leaves]
    y = case.dense_forward(leaves[0], leaves[1], None if bias is None else leaves[2])
    grads = torch.autograd.grad(y, leaves, case.dy)
    out = {"y": y.detach(), "dx": grads[0], "dvalues": case.topology.gather(grads[1])}
    return out if bias is None else {**out, "dbias": grads[2]}


def oracle(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results and magnitudes (products of absolute values) in float64."""
    wide = replace(
        case,
        x=case.x.double(),
        values=case.values.double(),
        dy=case.dy.double(),
        bias=None if case.bias is None else case.bias.double(),
    )
    positive = replace(
        wide,
        x=wide.x.abs(),
        values=wide.values.abs(),
        dy=wide.dy.abs(),
        bias=None if wide.bias is None else wide.bias.abs(),
    )
    return dense_run(wide), dense_run(positive)


def check_bounds(case: Case, results: dict[str, Tensor]) -> list[str]:
    """Failures of the componentwise rule."""
    expected, magnitude = oracle(case)
    failures = []
    for key, value in expected.items():
        try:
            testing.assert_componentwise(results[key], value, magnitude[key], name=key)
        except AssertionError as error:
            failures.append(f"{case.name}: {error}")
    return failures


def check_exact(case: Case, results: dict[str, Tensor]) -> list[str]:
    """Failures of bit equality on small integers."""
    expected, _ = oracle(case)
    return [
        f"{case.name}: {key} is not exact in {int((results[key] != value).sum())} entries"
        for key, value in expected.items()
        if not torch.equal(results[key].double(), value)
    ]


def report(failures: list[str]) -> str:
    return f"{len(failures)} failures:\n" + "\n".join(failures[:8])


def main(drill: str, first: int, count: int) -> None:
    torch.set_num_threads(1)
    digest, failures = hashlib.sha256(), []
    check = {"d01": check_bounds, "d02": check_exact, "digest": None}[drill]
    for kind in KINDS:
        for dtype in testing.NATIVE_DTYPES:
            for case in cases(kind, dtype, count, first, integers=drill != "d01"):
                results = run(case)
                if check is not None:
                    failures += check(case, results)
                for value in results.values():
                    digest.update(value.contiguous().numpy().tobytes())
    isa = torch.ops.sparse_kernels.cpu_isa()
    print(json.dumps({"isa": isa, "digest": digest.hexdigest(), "failures": failures[:8]}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
