"""What the CPU kernels have to reach: the figures of the issue "CPU kernels at the frontier", as data.

A speed-up is the dense time over ours, forward and backward, float32, same threads.
"""

from __future__ import annotations

from dataclasses import dataclass

from .measure import Row

SPARSITIES = (80, 90, 95, 98)

# (kind of case, format) -> must and stretch at 80, 90, 95, 98 % sparsity
SPEEDUPS: dict[tuple[str, str], tuple[tuple[float, ...], tuple[float, ...]]] = {
    ("linear", "CSR"): ((2.8, 5, 9, 15), (3.7, 7, 12, 22)),
    ("small linear", "CSR"): ((2, 3.5, 5.5, 8), (2.7, 5, 8, 12)),
    ("linear", "BSR 16"): ((4, 7, 12, 20), (5.3, 10, 18, 30)),
    ("linear", "BSR 8"): ((3.6, 6.3, 10.8, 18), (4.77, 9, 16.2, 27)),
    ("linear", "BSR 4"): ((3.2, 5.6, 9.6, 16), (4.24, 8, 14.4, 24)),
    ("conv 3x3", "CSR"): ((1.7, 3.2, 5, 8), (2.6, 5, 8, 13)),
    ("conv 3x3 s2", "CSR"): ((1.4, 2.4, 3.8, 5.5), (2, 3.5, 6, 9)),
    ("conv 1x1", "CSR"): ((1.6, 2.8, 4, 6), (2.3, 4, 6, 9)),
    ("conv 3x3", "BSR 16"): ((2.8, 4.5, 7, 10), (4, 7, 11, 18)),
    ("mlp", "CSR"): ((2, 3.8, 6, 9), (2.8, 5.5, 9, 14)),
    ("resnet18", "CSR"): ((1.4, 2.2, 3, 3.5), (1.8, 3, 4, 5)),
    ("wrn-22-2", "CSR"): ((1.5, 2.3, 3, 3.5), (2, 3, 4, 5)),
}

# (kind, format, op) -> share of the FMA peak. Rows time whole calls, with packing, copies and Python in them:
# a kernel alone is above its row.
PEAK_SHARES: dict[tuple[str, str, str], float] = {
    ("linear", "CSR", "forward"): 0.55,
    ("linear", "CSR", "dW"): 0.5,
    ("linear", "BSR 16", "step"): 0.9,
}

BFLOAT16 = 0.45  # times 1 / density, CSR Linear against dense bfloat16
BREAK_EVEN = 0.5  # sparsity from which CSR Linear is no slower than dense
AVX2 = 0.85  # of the speed with AVX-512
THREADS = 0.1  # how far a two-thread speed-up may be below the one-thread one
GROWTH = 1.15  # times the dense weight gradient
UPDATE = {90: 2.0, 98: 4.0}  # sparsity -> ordinary steps


@dataclass(frozen=True)
class Verdict:
    """One figure against what was asked.

    Attributes:
        what: was measured.
        value, must: to compare; `at_most` says in which direction.
        stretch: beyond the duty, or None.
        noisy: the turns differed too much to judge, or other processes took our cores.
    """

    what: str
    value: float
    must: float
    stretch: float | None = None
    at_most: bool = False
    noisy: bool = False

    @property
    def ratio(self) -> float:
        """Above 1: more than asked for."""
        if self.at_most:
            return self.must / self.value if self.value > 0 else float("inf")
        return self.value / self.must

    @property
    def word(self) -> str:
        """Met, stretch, missed or noisy."""
        if self.noisy:
            return "noisy"
        if self.ratio < 1:
            return "missed"
        beyond = self.stretch is not None and (
            self.value <= self.stretch if self.at_most else self.value >= self.stretch
        )
        return "stretch" if beyond else "met"


def judge(row: Row) -> list[Verdict]:
    """What the issue says of a row: nothing, or a speed-up, or a share of the peak."""
    sparsity = round(100 * (1 - row.density))
    noisy = row.noisy
    name = f"{row.case}, {row.format}, {sparsity} %"
    found = []
    if sparsity in SPARSITIES and row.op == "step":
        at = SPARSITIES.index(sparsity)
        if row.dtype == "bfloat16" and row.kind == "linear" and row.format == "CSR":
            found.append(Verdict(f"{name}, bfloat16", row.speedup, BFLOAT16 / row.density, noisy=noisy))
        elif row.dtype == "float32" and (row.kind, row.format) in SPEEDUPS:
            must, stretch = SPEEDUPS[row.kind, row.format]
            found.append(Verdict(name, row.speedup, must[at], stretch[at], noisy=noisy))
    share = PEAK_SHARES.get((row.kind, row.format, row.op))
    if share is not None and row.dtype == "float32" and row.isa == "avx512" and sparsity == 90:
        found.append(Verdict(f"{name}, {row.op}: share of FMA peak", row.peak, share, noisy=noisy))
    if row.kind == "growth":
        found.append(
            Verdict(f"{name}: growth pass / dense dW", row.extra["growth / dense dW"], GROWTH, at_most=True)
        )
        if sparsity in UPDATE:
            steps = row.extra["update / step"]
            found.append(Verdict(f"{name}: update in steps", steps, UPDATE[sparsity], at_most=True))
    if row.kind == "isa":
        what = f"{name}: AVX2 / AVX-512 speed"
        found.append(Verdict(what, row.extra["avx2 / avx512"], AVX2, noisy=noisy))
    return found


def judge_threads(many: list[Row], single: list[Row]) -> list[Verdict]:
    """Speed-ups on several threads against those of the same rows on one."""
    alone = {row.key[:-2]: row for row in single}
    found = []
    for row in many:
        other = alone.get(row.key[:-2])
        if other is None or row.op != "step" or row.kind in ("", "growth", "isa"):
            continue
        what = f"{row.case}, {row.format}, {1 - row.density:.0%}: speed-up on {row.threads} threads / on 1"
        noisy = row.noisy or other.noisy
        found.append(Verdict(what, row.speedup / other.speedup, 1 - THREADS, noisy=noisy))
    return found


def break_even(rows: list[Row]) -> dict[str, float]:
    """Layer -> the sparsity at which its speed-up crosses 1, between the two measured ones around it.

    Interpolated in the logarithm of the speed-up. A layer that is faster throughout has the least
    sparsity measured, one that is slower throughout has none.
    """
    import math

    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.op == "step" and row.kind not in ("growth", "isa"):
            name = f"{row.case}, {row.format}" + ("" if row.dtype == "float32" else f", {row.dtype}")
            curves.setdefault(name, []).append((1 - row.density, row.speedup))
    found = {}
    for name, curve in curves.items():
        curve.sort()
        if curve[0][0] > 0.65:  # nothing measured where it could be
            continue
        ahead = [i for i, (_, speedup) in enumerate(curve) if speedup < 1]
        last = ahead[-1] if ahead else -1  # the sparsest point at which dense is faster
        if last + 1 == len(curve):
            continue
        if last < 0:
            found[name] = curve[0][0]
            continue
        (s0, r0), (s1, r1) = curve[last], curve[last + 1]
        found[name] = s0 + (s1 - s0) * -math.log(r0) / (math.log(r1) - math.log(r0))
    return found


def judge_break_even(rows: list[Row]) -> list[Verdict]:
    """The break-even point of CSR Linear layers."""
    names = {f"{r.case}, {r.format}" for r in rows if r.kind == "linear" and r.format == "CSR"}
    points = break_even(rows)
    return [
        Verdict(f"{name}: break-even sparsity", points[name], BREAK_EVEN, at_most=True)
        for name in sorted(names & points.keys())
    ]
