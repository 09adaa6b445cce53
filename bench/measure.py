"""One layer against its rivals: checked, then raced, then put down as rows of figures."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import sparse_kernels as sk
from sparse_kernels import _ops
from sparse_kernels.testing import assert_normwise

from .registry import Case
from .rivals import rivals_of
from .timing import CROWDED, NOISY, Contestant, Race, Step, Times

# op -> (its parts: name, phase of the race, products among forward, dX, dW)
OPS: dict[str, tuple[tuple[str, int | None, int], ...]] = {
    "step": (("forward", 0, 1), ("backward", 1, 2), ("step", None, 3)),
    "dX": (("dX", 1, 1),),
    "dW": (("dW", 1, 1),),
}


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        suite, case, format, dtype, density, op: what was measured ("step": forward and backward).
        kind: the row of the table of targets (targets.py), or "".
        threads, isa: with what.
        ms: the median call of ours.
        dense: the fastest dense rival, and dense_ms its median.
        speedup: dense over ours: the median of the turns' ratios.
        spread: interquartile range of these ratios over their median.
        gflops: of the active weights' multiply-adds; 0 where that says nothing.
        peak: gflops over the measured FMA peak of as many threads (float32).
        rivals: median milliseconds of the others that gave the right result.
        extra: more figures of a suite.
        crowd: cores that other processes kept from us meanwhile.
        date: when.
    """

    suite: str
    case: str
    format: str
    density: float
    op: str
    ms: float
    dense: str
    dense_ms: float
    speedup: float
    spread: float
    threads: int
    isa: str
    kind: str = ""
    dtype: str = "float32"
    gflops: float = 0.0
    peak: float = 0.0
    rivals: dict[str, float] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)
    crowd: float = 0.0
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))

    @property
    def noisy(self) -> bool:
        """Whether the machine was too busy to judge the figure."""
        return self.spread > NOISY or self.crowd > CROWDED

    @property
    def key(self) -> tuple[Any, ...]:
        """What a later measurement of the same replaces."""
        return self.suite, self.case, self.format, self.dtype, self.density, self.op, self.threads, self.isa

    def dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def format_name(block_size: int) -> str:
    """What the tables call it."""
    return "CSR" if block_size == 1 else f"BSR {block_size}"


@functools.cache
def fma_peak(threads: int) -> float:
    """GFLOP/s of float32 multiply-adds between registers, on all these threads at once."""
    with ThreadPoolExecutor(threads) as pool:  # an operator releases the interpreter's lock
        return sum(pool.map(_ops.cpu_fma_peak, [0.2] * threads)) / 1e9


def training_step(module: nn.Module, x: Tensor, dy: Tensor, op: str = "step") -> Contestant:
    """Forward and backward of one layer as two phases.

    Args:
        op: "step" for all three products, "dX" or "dW" for a backward of that one alone.
    """
    x = x.detach().requires_grad_(op != "dW")
    for parameter in module.parameters():
        parameter.requires_grad_(op != "dX")
    kept: list[Tensor] = []

    def before() -> None:
        x.grad = None
        module.zero_grad()
        kept.clear()

    return Contestant(
        [lambda: kept.append(module(x)), lambda: kept[0].backward(dy)],
        before,
    )


def in_backend(name: str, contestant: Contestant) -> Contestant:
    """The same with one backend of ours in force, not what "auto" would choose."""

    def pinned(phase: Step) -> Step:
        def run() -> None:
            with sk.use_backend(name):
                phase()

        return run

    return Contestant([pinned(phase) for phase in contestant.phases], contestant.before)


def results(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output, input gradient, and the gradients of the parameters by name."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(dy)
    assert x.grad is not None
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "dX": x.grad, **grads}


class WrongResult(AssertionError):
    """Ours differs from masked dense: not worth timing."""


def check(layer: sk.SparseLinear | sk.SparseConv2d, x: Tensor, dy: Tensor, name: str = "layer") -> None:
    """Raise if the layer is wrong in any product: a wrong kernel is always fast."""
    twin = layer.to_dense()
    ours, theirs = results(layer, x, dy), results(twin, x, dy)
    values = layer.topology.to_dense(ours["values"])
    pairs = [
        ("output", ours["output"], theirs["output"]),
        ("dX", ours["dX"], theirs["dX"]),
        ("dW", values, theirs["weight"] * layer.mask()),
        ("db", ours["bias"], theirs["bias"]),
    ]
    rtol = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(x.dtype)
    for what, mine, expected in pairs:
        try:
            assert_normwise(mine, expected, rtol=rtol, name=f"{name}, {what}")
        except AssertionError as error:
            raise WrongResult(str(error)) from None


def agrees(rival: nn.Module, layer: sk.SparseLinear | sk.SparseConv2d, x: Tensor, dy: Tensor) -> bool:
    """Whether a rival computes what our (checked) layer does.

    Others store weights in an order of their own, so of their gradient the norm alone is compared.
    """
    try:
        theirs, ours = results(rival, x, dy), results(layer, x, dy)
    except Exception as error:  # of a package that we do not know
        print(f"{type(rival).__name__} fails: {error}", file=sys.stderr)
        return False
    gradient = torch.cat([t.flatten() for name, t in theirs.items() if name not in ("output", "dX")])
    expected = torch.cat([ours["values"].flatten(), ours["bias"]])
    try:
        for what in ("output", "dX"):
            assert_normwise(theirs[what], ours[what], rtol=1e-4, name=what)
        assert_normwise(gradient.norm()[None], expected.norm()[None], rtol=1e-3, name="dW")
    except AssertionError as error:
        print(f"{type(rival).__name__} is wrong: {error}", file=sys.stderr)
        return False
    return True


Start = Callable[[Race, str], object]


def measure(
    case: Case,
    density: float,
    block_size: int = 1,
    op: str = "step",
    *,
    suite: str = "",
    budget: float = 1.5,
    peers: bool = True,
    kernels: bool = False,
    dtype: torch.dtype = torch.float32,
    start: Start = lambda race, ours: race.run(),
) -> list[Row]:
    """Check one layer, race it against its rivals, and give a row for each part of the operation.

    Args:
        budget: seconds that the timed turns may take.
        peers: race the sparse rivals, too.
        kernels: ours are the sparse kernels whatever "auto" says, which is raced beside them.
        start: runs the race: as a whole, or round by round under a test runner.

    Raises:
        WrongResult: before anything was timed.
    """
    torch.manual_seed(0)
    dense = {name: (module.to(dtype), x.to(dtype)) for name, (module, x) in case.rivals().items()}
    x = next(iter(dense.values()))[1]
    layer = case.sparse(density, block_size).to(dtype)
    dy = torch.randn_like(layer(x))
    with sk.use_backend("cpu" if kernels else "auto"):
        check(layer, x, dy, f"{case.name}, {format_name(block_size)} at {1 - density:.0%}")
    # A dense layer gets its gradient in the layout of its output, as from the layer above.
    race_as = {
        name: training_step(module, data, dy.to(memory_format=_layout(data)), op)
        for name, (module, data) in dense.items()
    }
    others = rivals_of(layer, installed=op == "step") if peers else {}
    others = {name: module for name, module in others.items() if agrees(module, layer, x, dy)}
    race_as |= {name: training_step(module, x, dy, op) for name, module in others.items()}
    if x.dim() == 4:
        last = torch.channels_last
        race_as["ours channels_last"] = training_step(
            layer, x.to(memory_format=last), dy.to(memory_format=last), op
        )
    race_as["ours"] = training_step(layer, x, dy, op)
    if kernels:
        race_as["auto"] = race_as.pop("ours")
        race_as["ours"] = in_backend("cpu", training_step(layer, x, dy, op))
    race = Race(race_as, budget)
    start(race, "ours")

    threads, rows = torch.get_num_threads(), []
    crowd = race.crowd(threads)
    for part, phase, products in OPS[op]:
        best = race.best(list(dense), phase)
        ours, ratio = race.times("ours", phase), race.ratio(best, "ours", phase)
        gflops = 2 * products * case.multiply_adds * layer.density / ours.median / 1e9
        rows.append(
            Row(
                suite,
                case.name,
                format_name(block_size),
                density,
                part,
                ours.median * 1e3,
                best,
                race.times(best, phase).median * 1e3,
                ratio.median,
                ratio.spread,
                threads,
                _ops.cpu_isa(),
                case.kind,
                str(dtype).removeprefix("torch."),
                gflops,
                gflops / fma_peak(threads),
                fastest(race, [*dense, "ours"], phase),
                crowd=crowd,
            )  # fmt: skip
        )
    return rows


def _layout(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def fastest(race: Race, left_out: list[str], phase: int | None = None) -> dict[str, float]:
    """Milliseconds of each rival; of a package with two ways to do it, those of the faster one."""
    found: dict[str, Times] = {}
    for name in race.contestants:
        if name in left_out:
            continue
        times, short = race.times(name, phase), name.split(" (")[0]
        if short not in found or times.median < found[short].median:
            found[short] = times
    return {name: times.median * 1e3 for name, times in found.items()}
