"""What the GPU benchmark found: rows, targets, tables, the JSON file and the plot."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .gpu_rivals import Case

# Speed-up of a whole step (Y, dX and dW) over the dense library that must be reached, and that would be good:
# sparsity in percent, block -> (must, stretch). On an H200, bfloat16, `TARGET_SHAPE`.
TARGET_SHAPE = (8192, 4096, 4096)
TARGETS = {
    (80, 128): (3.0, 3.6), (80, 64): (1.9, 2.2), (80, 32): (1.1, 1.5), (80, 16): (0.97, 1.3),
    (90, 128): (5.5, 6.5), (90, 64): (3.5, 4.2), (90, 32): (2.1, 2.6), (90, 16): (1.15, 1.8),
    (95, 128): (8.3, 10.0), (95, 64): (6.2, 7.2), (95, 32): (3.9, 4.4), (95, 16): (2.2, 2.9),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One product of one case. Times are microseconds, medians; `low` and `high` are 20 % and 80 %.

    Attributes:
        op: "forward", "dX", "dW" or "step" (all three).
        us, low, high: the block-sparse kernels.
        dense_us: cuBLAS.
        auto_us: whatever backend "auto" chooses; measured for whole steps.
        floor_us: of the roofline model.
        tflops: useful multiply-adds, times two, per second.
        how: "graph", "eager" or "cpu" (no figure of a GPU).
    """

    case: Case
    op: str
    us: float
    low: float
    high: float
    dense_us: float
    floor_us: float
    tflops: float
    how: str
    auto_us: float | None = None

    @property
    def speedup(self) -> float:
        """Over cuBLAS."""
        return self.dense_us / self.us

    @property
    def sparsity(self) -> int:
        """In percent."""
        return round(100 * (1 - self.case.density))

    @property
    def target(self) -> tuple[float, float] | None:
        """What this row must reach, and what would be good."""
        sizes = (self.case.tokens, self.case.inputs, self.case.outputs)
        if self.op != "step" or sizes != TARGET_SHAPE or self.case.dtype != "bfloat16":
            return None
        return TARGETS.get((self.sparsity, self.case.block))

    @property
    def verdict(self) -> str:
        """On the target: "good", "met", "MISSED", or nothing; of what a user gets, which "auto" chooses."""
        if self.target is None:
            return ""
        speedup = self.dense_us / (self.auto_us or self.us)
        must, good = self.target
        return "good" if speedup >= good else "met" if speedup >= must else "MISSED"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("speedup", "sparsity", "target", "verdict")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class Verdict:
    """One requirement and what was measured.

    Attributes:
        what: in words.
        measured: the figure, or why there is none.
        must: what it must be, in words.
        met: None if it was not measured, or not on the device that it is meant for.
    """

    what: str
    measured: str
    must: str
    met: bool | None

    @property
    def word(self) -> str:
        """For tables."""
        return {True: "met", False: "MISSED", None: "not judged"}[self.met]


def at_least(what: str, value: float | None, least: float, unit: str = "x", judged: bool = True) -> Verdict:
    """A figure that must not be smaller."""
    return _verdict(what, value, least, unit, f">= {least:g}{unit}", judged, lambda v: v >= least)


def at_most(what: str, value: float | None, most: float, unit: str = " us", judged: bool = True) -> Verdict:
    """A figure that must not be larger."""
    return _verdict(what, value, most, unit, f"<= {most:g}{unit}", judged, lambda v: v <= most)


def _verdict(
    what: str, value: float | None, bound: float, unit: str, must: str, judged: bool, test: Any
) -> Verdict:
    if value is None:
        return Verdict(what, "not measured", must, None)
    digits = 2 if abs(bound) < 10 else 0
    return Verdict(what, f"{value:.{digits}f}{unit}", must, bool(test(value)) if judged else None)


def break_even(points: Iterable[tuple[float, float]]) -> str:
    """The sparsity from which on a product is faster than dense, out of (density, speed-up).

    On the line between two measured points, in logarithms of both.
    """
    ordered = sorted(points, reverse=True)  # dense first
    if not ordered:
        return "not measured"
    if ordered[0][1] >= 1:
        return f"below {1 - ordered[0][0]:.0%}"
    for (d0, s0), (d1, s1) in zip(ordered, ordered[1:], strict=False):
        if s0 < 1 <= s1:
            share = math.log(1 / s0) / math.log(s1 / s0)
            density = math.exp(math.log(d0) + share * (math.log(d1) - math.log(d0)))
            return f"{1 - density:.0%}"
    return f"above {1 - ordered[-1][0]:.0%}"


def groups(rows: list[Row], op: str) -> dict[tuple[str, int], list[Row]]:
    """Rows of one product by shape and block, dense first."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in sorted(rows, key=lambda r: (-r.case.tokens * r.case.inputs, r.case.block, -r.case.density)):
        if row.op == op:
            found.setdefault((row.case.shape, row.case.block), []).append(row)
    return found


# conditions and files -------------------------------------------------------------------------------


def conditions(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What figures depend on besides the program."""
    import triton

    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu (no figure of a GPU)",
        "nvidia-smi": _nvidia_smi() if device == "cuda" else {},
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "arguments": arguments,
        "timing": "medians of CUDA graphs of many calls on rotated buffers, rivals in turns",
    }


def _nvidia_smi() -> dict[str, str]:
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
    line = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    values = line.splitlines()[0].split(", ") if line else []
    return dict(zip(fields, values, strict=False))


def _output(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=False, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def slug(name: str) -> str:
    """A name as a folder name."""
    return "-".join("".join(c if c.isalnum() else " " for c in name).lower().split())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """By way of a temporary file: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(content, indent=1) + "\n")
    fresh.replace(path)


# tables and plot ------------------------------------------------------------------------------------


def products_table(rows: list[Row], title: str) -> Any:
    """All rows."""
    from rich.table import Table

    table = Table(title=title)
    for name in ("layer", "block", "sparsity", "product", "us", "20-80 %", "cuBLAS us", "speed-up", "auto",
                 "TFLOP/s", "% of floor", "must / good", ""):  # fmt: skip
        table.add_column(name, justify="left" if name in ("layer", "product", "") else "right", no_wrap=True)
    for row in rows:
        target = row.target
        table.add_row(
            row.case.shape, str(row.case.block), f"{row.sparsity} %", row.op, f"{row.us:.1f}",
            f"{row.low:.1f}-{row.high:.1f}", f"{row.dense_us:.1f}", f"{row.speedup:.2f}x",
            f"{row.dense_us / row.auto_us:.2f}x" if row.auto_us else "", f"{row.tflops:.0f}",
            f"{row.floor_us / row.us:.0%}", f"{target[0]:g}x / {target[1]:g}x" if target else "", row.verdict,
            end_section=row.op == "step",
        )  # fmt: skip
    return table


def break_even_table(rows: list[Row]) -> Any:
    """Sparsity from which on the layer pays, for each shape, block and product."""
    from rich.table import Table

    ops = list(dict.fromkeys(row.op for row in rows))
    table = Table(title="break-even sparsity against cuBLAS (interpolated)")
    for name in ("layer", "block", *ops):
        table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=True)
    for shape, block in groups(rows, ops[0]) if ops else ():
        cells = [
            break_even((r.case.density, r.speedup) for r in groups(rows, op).get((shape, block), []))
            for op in ops
        ]
        table.add_row(shape, str(block), *cells)
    return table


def verdicts_table(verdicts: list[Verdict]) -> Any:
    """Requirements besides those of single rows."""
    from rich.table import Table

    table = Table(title="requirements")
    for name in ("what", "measured", "must be", ""):
        table.add_column(name, no_wrap=name != "what")
    for v in verdicts:
        table.add_row(v.what, v.measured, v.must, v.word)
    return table


def plot(path: Path, rows: list[Row], title: str) -> None:
    """Speed-up of a whole step over density, one line a block; break-even and 1/density marked."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    by_group = groups(rows, "step")
    shapes = list(dict.fromkeys(shape for shape, _ in by_group))
    figure, axes = plt.subplots(
        1, max(1, len(shapes)), figsize=(5.5 * max(1, len(shapes)), 4.5), squeeze=False
    )
    for axis, shape in zip(axes[0], shapes, strict=False):
        densities = sorted(
            {r.case.density for (s, _), found in by_group.items() if s == shape for r in found}
        )
        axis.plot(densities, [1 / d for d in densities], "k:", label="1 / density")
        axis.axhline(1, color="gray", lw=0.8)
        for (s, block), found in by_group.items():
            if s != shape:
                continue
            x, y = [r.case.density for r in found], [r.speedup for r in found]
            even = break_even(zip(x, y, strict=True))
            axis.plot(x, y, "o-", label=f"{block} x {block}, even at {even}")
        axis.set(xscale="log", yscale="log", title=shape, xlabel="sparsity", ylabel="speed-up over cuBLAS")
        axis.invert_xaxis()
        axis.set_xticks(densities, [f"{1 - d:.0%}" for d in densities])
        axis.minorticks_off()
        ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16) if t <= 1.1 / min(densities)]
        axis.set_yticks(ticks, [f"{t:g}x" for t in ticks])
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
