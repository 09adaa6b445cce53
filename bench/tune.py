"""Measures every launch configuration on this GPU and rewrites the table that the kernels choose from.

    python3 -m bench.tune                   # all products, blocks, arithmetics and batches
    python3 -m bench.tune --quick           # bfloat16 and 8192 tokens, under 3 minutes
    python3 -m bench.tune --ops spmm --blocks 64 --arithmetics float16 --tokens 1024,8192
    python3 -m bench.tune --device cpu --smoke --out /tmp/table.json     # tries the program out

A candidate is compared with float32 first; one that is wrong or does not run is named and left out. The rule
stays where nothing beats it by more than the noise. Sizes: a layer 4096 x 4096, 10 % of its blocks active.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_kernels import layout

from .gpu_rivals import BACKWARD_ERROR, Case, Operands, check, strict_float32
from .gpu_timing import Call, Clock

OPS = ("spmm", "sddmm", "growth_norms")
BLOCKS = (64, 128, 32, 16)  # the most important first: what a budget leaves out is at the end
ARITHMETICS = ("bfloat16", "float16", "tf32", "float32")
TOKENS = (8192, 4096, 1024, 32768)  # one of each bucket of `configs.Problem`
SIDE, DENSITY = 4096, 0.1
NOISE = 0.02  # a winner must beat the rule by more
QUICK_SECONDS = 170


@dataclass(frozen=True)
class Tuned:
    """One problem.

    Attributes:
        key: `Problem.key`.
        config: the winner.
        us, rule_us: its time, and that of the rule; equal where the rule stays.
        measured: candidates that were timed.
        refused: why others were not.
    """

    key: str
    config: Any
    us: float
    rule_us: float
    measured: int
    refused: list[str]


def problems(a: argparse.Namespace) -> Iterator[Any]:
    """Everything to be measured, the most important first."""
    from sparse_kernels.triton.configs import Problem

    for arithmetic in a.arithmetics:
        for tokens in a.tokens:
            for block in a.blocks:
                for op in a.ops:
                    yield Problem(op, block, block, arithmetic, tokens)
                    if op == "spmm":
                        yield Problem(op, block, block, arithmetic, tokens, transposed=True)


def candidates(problem: Any, device: str) -> list[Any]:
    """All of `configs`, the rule first; on a CPU without Gluon, which no interpreter knows."""
    from sparse_kernels.triton import configs

    found = configs.candidates(problem)
    return found if device == "cpu" else found + configs.warp_specialised(problem)


class Setting:
    """Operands of one block size, dtype and batch, and their products in float32."""

    def __init__(self, problem: Any, device: str, side: int) -> None:
        dtype = "float32" if problem.arithmetic == "tf32" else problem.arithmetic
        case = Case(problem.tokens, side, side, problem.out, DENSITY if side == SIDE else 0.5, dtype)
        self.o = o = Operands(case, device, copies=3 if side == SIDE else 1)
        t = o.topology._with_layout("gpu")
        self.index, self.offsets = t.index, layout.offsets(t.n_blocks, t.rows, t.cols, problem.inner)
        self.device = device
        self.processors = 2 if device == "cpu" else torch.cuda.get_device_properties(0).multi_processor_count
        x, dy, w = o.x[0], o.dy[0], o.dense
        self.references = {
            "spmm": (lambda: x.float() @ w.float().t(), lambda: x @ w.t()),
            "spmmt": (lambda: dy.float() @ w.float(), lambda: dy @ w),
            "sddmm": (
                lambda: o.topology.gather(dy.float().t() @ x.float()),
                lambda: o.topology.gather(dy.t() @ x),
            ),
            "growth_norms": (lambda: self._norms(torch.float32), lambda: self._norms(dy.dtype)),
        }

    def _norms(self, dtype: torch.dtype) -> Tensor:
        gradient = self.o.dy[0].to(dtype).t() @ self.o.x[0].to(dtype)
        return self.o.topology.to_blocks(gradient.float()).abs().sum((-2, -1))

    def launch(self, problem: Any, config: Any, x: Tensor, dy: Tensor, out: Tensor) -> Tensor:
        """One call of a launcher; the result is `out` or a fresh tensor."""
        from sparse_kernels.triton import bsr_sddmm, growth, operators

        precision = "tf32" if problem.arithmetic == "tf32" else "ieee"
        if problem.op == "growth_norms":
            sides = (problem.out, problem.inner)
            return growth.block_norms(x, dy, *sides, "l1", config=config, precision=precision).flatten()
        if problem.op == "sddmm":
            bsr_sddmm.bsr_sddmm(
                dy, x, out, self.index, self.offsets,
                config=config, processors=self.processors, precision=precision,
            )  # fmt: skip
            return out
        operators.launch_spmm(
            dy if problem.transposed else x, self.o.values, None, self.index, self.offsets, out,
            transposed=problem.transposed, config=config,
        )  # fmt: skip
        return out

    def output(self, problem: Any) -> Tensor:
        """Memory for the result, poisoned."""
        o = self.o
        like = {"spmm": o.x[0] if problem.transposed else o.dy[0], "sddmm": o.values}.get(problem.op, o.x[0])
        return torch.full_like(like, float("nan"))


def tune(problem: Any, setting: Setting, clock: Clock, most: int | None) -> Tuned:
    """Check and time the candidates of a problem, in turns."""
    o, out, refused = setting.o, setting.output(problem), []
    # What kernels and rivals do with float32; references are better than either.
    torch.set_float32_matmul_precision("high" if problem.arithmetic == "tf32" else "highest")
    wide, narrow = setting.references[problem.op + ("t" if problem.transposed else "")]
    with strict_float32():
        expected = wide().flatten()
    rival = narrow().flatten()
    rivals: dict[Any, list[Call]] = {}
    for config in candidates(problem, setting.device)[:most]:
        try:
            out.fill_(float("nan"))
            actual = setting.launch(problem, config, o.x[0], o.dy[0], out).flatten()
            clock.synchronize()
            # Norms come in float32, and are compared as the dense gradient's dtype allows.
            check(f"{config}", actual.to(rival.dtype), expected, rival, BACKWARD_ERROR)
        except Exception as error:  # out of resources, wrong, not compiled: all the same here
            refused.append(f"{config}: {type(error).__name__}: {str(error)[:200]}")
            continue
        rivals[config] = [
            lambda x=x, dy=dy, config=config: setting.launch(problem, config, x, dy, out)  # type: ignore[misc]
            for x, dy in zip(o.x, o.dy, strict=True)
        ]
    if not rivals:
        raise RuntimeError(f"no candidate runs: {'; '.join(refused)}")
    times = {config: sample.median for config, sample in clock.compare(rivals).items()}
    rule = next(iter(times))
    winner = min(times, key=lambda config: times[config])
    if times[winner] > (1 - NOISE) * times[rule]:
        winner = rule
    return Tuned(problem.key, winner, times[winner], times[rule], len(times), refused)


def run(a: argparse.Namespace, clock: Clock) -> int:
    """Tune, print, and write the table. The exit status is 1 if a problem had no configuration that works."""
    import tqdm

    from sparse_kernels.triton import configs

    if a.out:
        configs.TABLE = a.out
        configs._table.cache_clear()
    setting, found, failures, left_out = None, [], [], 0
    clock.warm_up()
    made_for, end = None, time.monotonic() + a.budget if a.budget else float("inf")
    todo = list(problems(a))
    for problem in (bar := tqdm.tqdm(todo, unit="problem", disable=None)):
        bar.set_description(problem.key)
        if time.monotonic() > end:
            left_out += 1
            continue
        key = (problem.out, problem.arithmetic, problem.tokens)
        if made_for != key:
            setting, made_for = None, None  # memory for the next
            setting, made_for = Setting(problem, a.device, a.side), key
        try:
            assert setting is not None
            found.append(tune(problem, setting, clock, a.most))
        except RuntimeError as error:
            failures.append(f"{problem.key}: {error}")
    device = torch.cuda.get_device_name() if a.device == "cuda" else "cpu"
    if found:
        configs.write_table(device, {t.key: (t.config, t.us) for t in found})
    show(found, device)
    if left_out:
        print(f"{left_out} of {len(todo)} problems left out, no time: they keep what they had")
    for line in failures:
        print(f"FAILED: {line}")
    print(f"{len(found)} entries written to {configs.TABLE}")
    return 1 if failures else 0


def show(found: list[Tuned], device: str) -> None:
    """What was gained over the rule."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"launch table of {device}")
    for name in ("problem", "tokens", "step", "warps", "stages", "window", "kernel", "us", "rule us", "gain"):
        table.add_column(name, justify="left" if name == "problem" else "right", no_wrap=True)
    for t in found:
        c = t.config
        numbers = map(str, (c.tokens, c.step, c.warps, c.stages, c.window, c.kernel))
        gain = f"{t.rule_us / t.us - 1:.0%}" if t.us < t.rule_us else "rule"
        table.add_row(t.key, *numbers, f"{t.us:.1f}", f"{t.rule_us:.1f}", gain)
    Console(width=max(140, Console().width)).print(table)
    for t in found:
        for line in t.refused:
            print(f"left out, {t.key}: {line}")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ops", type=_names(OPS), default=OPS, help=", ".join(OPS))
    add("--blocks", type=lambda s: tuple(map(int, s.split(","))), default=BLOCKS, help="sides of a block")
    add("--arithmetics", type=_names(ARITHMETICS), default=ARITHMETICS, help=", ".join(ARITHMETICS))
    add("--tokens", type=lambda s: tuple(map(int, s.split(","))), default=TOKENS, help="sizes of a batch")
    add("--turns", type=int, default=7, help="replays of every candidate")
    add("--quick", action="store_true", help=f"bfloat16, 8192 tokens, {QUICK_SECONDS} seconds")
    add("--budget", type=float, default=0, help="seconds after which the rest is left out [no limit]")
    add("--out", type=Path, help="another table than that of the package")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--smoke", action="store_true", help="tiny sizes, the first two candidates")
    a = parser.parse_args(argv)
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --smoke tries the program out without one")
    if a.device == "cpu" and not (a.smoke and a.out):
        parser.error("on a CPU the program can only be tried out: --smoke --out FILE")
    a.side, a.most = SIDE, None
    if a.quick:
        a.arithmetics, a.tokens, a.budget = ("bfloat16",), (8192,), a.budget or QUICK_SECONDS
    if a.smoke:
        a.side, a.most, a.turns, a.blocks, a.tokens = 128, 2, 1, (64, 16), (48,)
        a.arithmetics = ("float32", "tf32") if a.device == "cpu" else ("bfloat16",)
    return a


def _names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {unknown[0]!r}")
        return found

    return parse


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run."""
    a = arguments(argv)
    if a.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, which is later
        torch.set_num_threads(1)
    clock = Clock(a.device, a.turns)
    with clock.on_stream():
        return run(a, clock)


if __name__ == "__main__":
    raise SystemExit(main())
