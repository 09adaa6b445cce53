"""Times block-sparse layers against cuBLAS and other libraries on a GPU.

    python3 -m bench.gpu                               # four layers, four densities, four blocks
    python3 -m bench.gpu --quick --budget 240          # what `make gpu` runs
    python3 -m bench.gpu --shapes 8192x4096x4096 --densities 0.1 --blocks 64,128
    python3 -m bench.gpu --first-hour                  # what the roofline stands on
    python3 -m bench.gpu --device cpu --smoke          # every part once, at tiny sizes: no figures

Prints tables, and writes a JSON file and a plot into bench/results/<device>/. Every result is compared with
float32 before it is timed; one that is wrong is named, not timed, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import gpu_report as report
from . import roofline
from .gpu_report import Row, Verdict, at_least, at_most
from .gpu_rivals import OPS, PEERS, Case, Operands, check_ours, dense_calls, peer_calls, sparse_calls
from .gpu_timing import Clock
from .gpu_update import DELTA_T, Training, measure_growth, measure_host, overhead

SHAPES = ((8192, 4096, 4096), (8192, 1024, 4096), (8192, 4096, 16384), (8192, 768, 3072))
DENSITIES = (0.5, 0.2, 0.1, 0.05)
BLOCKS = (16, 32, 64, 128)
QUICK_CASES = ((0.1, 64), (0.1, 128))  # density and block, of all shapes but the first
SMOKE_SHAPE = (64, 128, 256)
HOST_MOST, UPDATE_MOST, GROWTH_MOST = 12, 150, 410  # microseconds


@dataclass
class Results:
    """What has been found so far; written even when a later part fails."""

    rows: list[Row] = field(default_factory=list)
    extras: dict[str, Any] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "rows": [row.as_dict() for row in self.rows],
            "extras": self.extras,
            "requirements": [{**asdict(v), "verdict": v.word} for v in self.verdicts],
            "failures": self.failures,
            "left_out": self.left_out,
        }


class Bench:
    """All parts of the benchmark on one device, within a budget of time."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        self.clock = Clock(a.device, a.turns)
        self.results = Results()
        self.end = time.monotonic() + a.budget if a.budget else float("inf")
        self.cuda = a.device == "cuda"
        self.ours = "triton" if self.cuda else "auto"
        name = torch.cuda.get_device_name() if self.cuda else ""
        self.roof = roofline.device_for(name).scaled(a.dtype)
        self.main = a.shapes[0]

    def cases(self) -> list[Case]:
        """The grid, first what the targets are for."""
        found = [
            Case(*shape, block, density, self.a.dtype)
            for shape in self.a.shapes
            for density in self.a.densities
            for block in self.a.blocks
            if not self.a.quick or shape == self.main or (density, block) in QUICK_CASES
        ]
        return [case for case in found if case.fits]

    def part(self, what: str, run: Callable[[], None]) -> None:
        """Run one part; a failure is kept, and does not stop the others."""
        if time.monotonic() > self.end:
            self.results.left_out.append(what)
            return
        print(f"{what} ...", file=sys.stderr, flush=True)
        try:
            run()
        except Exception as error:  # a kernel may fail in any way; the report says how
            self.results.failures.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")
            print(traceback.format_exc(limit=-3), file=sys.stderr)

    def run(self) -> Results:
        """Everything, the requirements first."""
        self.clock.warm_up()
        block, density = (16, 0.5) if self.a.smoke else (64, 0.1)
        main = Case(*self.main, block, density, self.a.dtype)
        wanted = self.cases()
        first = [case for case in wanted if (case.tokens, case.inputs, case.outputs) == self.main]
        rest = [case for case in wanted if case not in first]
        for case in first:
            self.part(_name(case), lambda case=case: self.products(case))  # type: ignore[misc]
        self.part("other libraries", lambda: self.peers(self._fitting(main)))
        for block, least in ((128, 0.65), (64, 0.4)):
            case = self._fitting(replace(main, block=block, density=1.0))
            self.part(_name(case), lambda case=case, least=least: self.all_active(case, least))  # type: ignore[misc]
        self.part("growth scores", lambda: self.growth(self._fitting(main)))
        self.part("topology update", lambda: self.update(self._fitting(main)))
        self.part("host time of a call", self.host)
        for case in rest:
            self.part(_name(case), lambda case=case: self.products(case))  # type: ignore[misc]
        slowest = min((r.dense_us / r.auto_us for r in self.results.rows if r.auto_us), default=None)
        self.results.verdicts.append(
            at_least('slowest step of backend "auto"', slowest, 0.95, judged=self.cuda)
        )
        return self.results

    def _fitting(self, case: Case) -> Case:
        """With the largest block that fits: smoke runs have small layers."""
        block = next(b for b in (case.block, 64, 32, 16) if replace(case, block=b).fits)
        return replace(case, block=block)

    def products(self, case: Case) -> None:
        """Forward, both gradients and all three, against cuBLAS."""
        o = Operands(case, self.a.device)
        check_ours(o, self.ours)
        if self.ours != "auto":
            check_ours(o, "auto")
        for op in OPS:
            self.results.rows.append(self.row(o, op))

    def row(self, o: Operands, op: str) -> Row:
        """One product."""
        case, p = o.case, o.case.product
        rivals = {"ours": sparse_calls(o, op, self.ours), "dense": dense_calls(o, op)}
        if op == "step":
            rivals["auto"] = sparse_calls(o, op, "auto")
        found = self.clock.compare(rivals)
        floors = {
            "forward": lambda: roofline.spmm(p, self.roof).seconds,
            "dX": lambda: roofline.spmm(p.transposed, self.roof).seconds,
            "dW": lambda: roofline.sddmm(p, self.roof).seconds,
            "step": lambda: roofline.step(p, self.roof),
        }
        ours = found["ours"]
        return Row(
            case=case,
            op=op,
            us=ours.median,
            low=ours.low,
            high=ours.high,
            dense_us=found["dense"].median,
            floor_us=1e6 * floors[op](),
            tflops=(3 if op == "step" else 1) * p.flops / ours.median / 1e6,
            how=ours.how,
            auto_us=found["auto"].median if op == "step" else None,
        )

    def peers(self, case: Case) -> None:
        """Forward of other libraries."""
        o = Operands(case, self.a.device)
        check_ours(o, self.ours)
        names = [name for name in PEERS if self.a.tune_peers or "tuned" not in name]
        calls, refused = peer_calls(o, names)
        ours = {"ours": sparse_calls(o, "forward", self.ours), "cuBLAS": dense_calls(o, "forward")}
        found = self.clock.compare({**ours, **calls})
        us = {name: sample.median for name, sample in found.items()}
        self.results.extras["peers, forward"] = {
            "case": asdict(case), "us": us, "how": {n: s.how for n, s in found.items()}, "refused": refused
        }  # fmt: skip
        at = f"{case.block} x {case.block}, {1 - case.density:.0%}"
        for name, least in (("torch BSR", 3.0), ("torch BSR tuned", 1.8), ("torch CSR (cuSPARSE)", 5.0)):
            value = us[name] / us["ours"] if name in us else None
            if name in names:
                self.results.verdicts.append(
                    at_least(f"forward against {name}, {at}", value, least, judged=self.cuda)
                )
                if name in refused:
                    print(f"{name} left out: {refused[name]}", file=sys.stderr)

    def all_active(self, case: Case, least: float) -> None:
        """Efficiency of the kernel when nothing is skipped."""
        o = Operands(case, self.a.device)
        check_ours(o, self.ours)
        row = self.row(o, "forward")
        self.results.extras[f"all active, forward, block {case.block}"] = row.as_dict()
        what = f"all blocks active, {case.block} x {case.block}, forward against cuBLAS"
        self.results.verdicts.append(at_least(what, row.speedup, least, judged=self.cuda))

    def growth(self, case: Case) -> None:
        """Scores of all blocks."""
        found = measure_growth(Operands(case, self.a.device), self.clock)
        floor = 1e6 * roofline.growth(case.product, self.roof).seconds
        self.results.extras["growth"] = {
            "case": asdict(case), "floor_us": floor, **{name: asdict(s) for name, s in found.items()}
        }  # fmt: skip
        us = found["ours"].median
        judged = self.cuda and self.main == report.TARGET_SHAPE
        self.results.verdicts.append(at_most("growth scores of a layer", us, GROWTH_MOST, judged=judged))
        dense = found["cuBLAS dW"].median
        self.results.verdicts.append(
            at_least("growth scores against cuBLAS dW", dense / us, 0.85, judged=self.cuda)
        )

    def update(self, case: Case) -> None:
        """One topology update, and what growth and updates cost of a training."""
        found = Training(case, self.a.device).measure(self.clock)
        floor = 1e6 * roofline.update(case.product, self.roof).plan
        extras = self.results.extras
        extras["update"] = {"case": asdict(case), "plan_us": floor, **asdict(found)}
        judge = self.results.verdicts.append
        us = found.device.median
        judge(at_most("topology update of a layer, device", us, UPDATE_MOST, judged=self.cuda))
        judge(Verdict("topology update of a layer, host", f"{found.host.median:.0f} us", "", None))
        waits = found.synchronisations
        met = (not waits) if self.cuda else None
        judge(Verdict("synchronisations in an update", waits or ("none" if self.cuda else "-"), "none", met))
        steps = [r.us for r in self.results.rows if r.op == "step" and r.case == case]
        growth = extras.get("growth", {}).get("ours", {}).get("median")
        share = 100 * overhead(growth, us, steps[0]) if steps and growth else None
        what = f"RigL, share of the products' time at delta_t = {DELTA_T}"
        judge(at_most(what, share, 2, " %", judged=self.cuda))

    def host(self) -> None:
        """Eager launch cost."""
        found = measure_host(self.clock, self.a.device, self.a.dtype)
        self.results.extras["host time of a call"] = {name: asdict(s) for name, s in found.items()}
        for name, sample in found.items():
            what = f"host time of a call: {name}"
            if name == "nn.functional.linear":
                self.results.verdicts.append(Verdict(what, f"{sample.median:.1f} us", "", None))
            else:
                self.results.verdicts.append(at_most(what, sample.median, HOST_MOST, judged=self.cuda))


def _name(case: Case) -> str:
    return f"{case.shape}, block {case.block}, {1 - case.density:.0%} sparse"


def show(results: Results, title: str) -> None:
    """Print the tables."""
    from rich.console import Console

    console = Console()
    console = Console(width=max(160, console.width))
    console.print(report.products_table(results.rows, title))
    console.print(report.break_even_table(results.rows))
    console.print(report.verdicts_table(results.verdicts))
    for what, found in (("FAILED", results.failures), ("left out, no time", results.left_out)):
        for line in found:
            print(f"{what}: {line}")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", type=_shapes, default=SHAPES, help="tokens x inputs x outputs, with commas")
    add("--densities", type=_list(float), default=DENSITIES, help="fractions of active blocks")
    add("--blocks", type=_list(int), default=BLOCKS, help="sides of a block")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--turns", type=int, default=10, help="replays of every rival")
    add("--out", type=Path, help="folder of JSON and plot [bench/results/<device>]")
    add("--quick", action="store_true", help="the first shape wholly, of the others two cases")
    add("--budget", type=float, default=0, help="seconds after which what is left is left out [no limit]")
    add("--tune-peers", action="store_true", help="torch's own tuner for torch's kernel, too (minutes)")
    add("--first-hour", action="store_true", help="bandwidths, instruction rates and launch costs instead")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--smoke", action="store_true", help="tiny sizes")
    a = parser.parse_args(argv)
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --smoke tries the program out without one")
    if a.device == "cpu" and not a.smoke:
        parser.error("this measures GPUs; on a CPU it can only be tried out, with --smoke (see bench.run)")
    if a.smoke:
        a.shapes, a.densities, a.blocks, a.turns = (SMOKE_SHAPE,), (0.5, 0.1), (16, 64), 2
        a.dtype = "float32" if a.device == "cpu" else a.dtype
    return a


def _list(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = f"{kind.__name__} list"
    return parse


def _shapes(text: str) -> tuple[tuple[int, int, int], ...]:
    found = tuple(tuple(int(n) for n in part.split("x")) for part in text.split(","))
    if any(len(shape) != 3 for shape in found):
        raise argparse.ArgumentTypeError(f"expected shapes such as 8192x4096x4096, got {text!r}")
    return found  # type: ignore[return-value]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write. The exit status is 1 if anything failed or was wrong."""
    a = arguments(argv)
    if a.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, which is later
        torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # float32 on the tensor cores, on both sides
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items()}
    facts = report.conditions(a.device, plain)
    results_of_gpus = Path(__file__).parent / "results" / report.slug(facts["device"])
    out = a.out or (results_of_gpus if a.device == "cuda" else Path("build/bench-smoke"))
    stamp = out / time.strftime("%Y-%m-%d-%H%M%S")
    title = f"{facts['device']}, {a.dtype}, torch {facts['torch']}, Triton {facts['triton']}"
    if a.first_hour:
        from . import first_hour

        found = first_hour.run(a.device, a.smoke)
        path = stamp.with_name(f"{stamp.name}-first-hour.json")
        report.write_json(path, {"conditions": facts, **found})
        print(f"written to {path}")
        return 0
    bench = Bench(a)
    try:
        with bench.clock.on_stream():
            bench.run()
    finally:
        results = bench.results
        report.write_json(stamp.with_suffix(".json"), {"conditions": facts, **results.as_dict()})
    show(results, title)
    report.plot(stamp.with_suffix(".png"), results.rows, title)
    print(f"written to {stamp}.json and .png")
    return 1 if results.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
