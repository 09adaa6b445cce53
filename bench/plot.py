"""Speed-up over density, one panel for each case: log axes, the 1/density limit, break-even points."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from .measure import Row
from .targets import break_even

matplotlib.use("Agg")

_PEER_COLOURS = {"torch.sparse": "0.35", "SparseLab": "0.5", "SparseProp": "0.65"}
_PEER_DASHES = {"torch.sparse": "--", "SparseLab": "-.", "SparseProp": ":"}


def plot(rows: list[Row], path: Path) -> bool:
    """Draw the whole steps of one suite. Returns False if there is no curve to draw."""
    import matplotlib.pyplot as plt

    rows = [
        row
        for row in rows
        if row.op == "step" and row.dtype == "float32" and row.kind not in ("growth", "isa")
    ]
    cases = list(dict.fromkeys(row.case for row in rows))
    if all(len({row.density for row in rows if row.case == case}) < 2 for case in cases):
        return False
    across = min(3, len(cases))
    down = -(-len(cases) // across)
    figure, axes = plt.subplots(down, across, figsize=(4.6 * across, 3.9 * down), squeeze=False)
    crossings = break_even(rows)
    for axis, case in zip(axes.flat, cases, strict=False):
        _panel(axis, case, [row for row in rows if row.case == case], crossings)
    for axis in list(axes.flat)[len(cases) :]:
        axis.set_visible(False)
    axes[0, 0].legend(fontsize=7, loc="upper left")
    first = rows[0]
    what = f"{first.suite}: dense time / sparse time, forward + backward"
    figure.suptitle(f"{what}, {first.threads} thread(s), {first.isa}", fontsize=10)
    figure.tight_layout()
    fresh = path.with_suffix(".tmp.png")
    figure.savefig(fresh, dpi=110)
    plt.close(figure)
    fresh.replace(path)
    return True


def _panel(axis, case: str, rows: list[Row], crossings: dict[str, float]) -> None:  # type: ignore[no-untyped-def]
    densities = sorted({row.density for row in rows})
    axis.plot(densities, [1 / d for d in densities], color="0.8", linewidth=4, label="1 / density", zorder=0)
    axis.axhline(1, color="0.6", linewidth=0.8)
    for at, name in enumerate(dict.fromkeys(row.format for row in rows)):
        curve = sorted((row.density, row.speedup) for row in rows if row.format == name)
        axis.plot(*zip(*curve, strict=True), marker="o", markersize=3, color=f"C{at}", label=name)
        crossing = crossings.get(f"{case}, {name}")
        if crossing is not None:
            axis.plot([1 - crossing], [1], marker="v", color=f"C{at}", markersize=8)
            axis.annotate(
                f"{crossing:.0%} sparse", (1 - crossing, 1), fontsize=7, color=f"C{at}", rotation=90,
                xytext=(0, 8), textcoords="offset points", ha="center", va="bottom",
            )  # fmt: skip
    for name, colour in _PEER_COLOURS.items():
        curve = sorted((r.density, r.dense_ms / r.rivals[name]) for r in rows if name in r.rivals)
        if curve:
            axis.plot(*zip(*curve, strict=True), color=colour, linestyle=_PEER_DASHES[name], label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.invert_xaxis()
    ticks = [d for d in (0.8, 0.5, 0.2, 0.1, 0.05, 0.02) if densities[0] <= d <= densities[-1]]
    axis.set_xticks(ticks, [f"{d:g}" for d in ticks])
    axis.minorticks_off()
    steps = [y for y in (0.2, 0.5, 1, 2, 5, 10, 20, 50) if axis.get_ylim()[0] <= y <= axis.get_ylim()[1]]
    axis.set_yticks(steps, [f"{y:g}" for y in steps])
    axis.set_xlabel("density")
    axis.set_title(case, fontsize=9)
