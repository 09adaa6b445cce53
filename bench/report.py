"""From rows of figures to tables on the screen, verdicts, and files: JSON, CSV and a plot for each suite."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sparse_kernels import _ops

from . import targets
from .measure import Row, fma_peak

PEERS = ("torch.sparse", "SparseLab", "SparseProp")


def machine() -> str:
    """The processor's name as a folder name."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":")[1] if lines else name
    return "-".join("".join(c if c.isalnum() else " " for c in name).lower().split())


def conditions() -> dict[str, Any]:
    """What every row of a file has in common. Rows measured under others are not mixed with these."""
    return {
        "cpu": machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "isa": _ops.cpu_isa(),
        "threads": torch.get_num_threads(),
    }


def _path(out: Path, suite: str, threads: int) -> Path:
    return out / f"{suite}-{threads}t.json"


def read(out: Path, suite: str, threads: int) -> list[Row]:
    """The rows of a file measured under today's conditions but for the threads; none if there is no such."""
    path = _path(out, suite, threads)
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    same = conditions() | {"threads": threads}
    if any(found["conditions"].get(name) != value for name, value in same.items()):
        return []
    return [Row(**row) for row in found["rows"]]


def write(rows: list[Row], out: Path, add: bool = False) -> list[Path]:
    """A JSON and a CSV file for each suite, and a plot if matplotlib is there.

    Args:
        add: keep the rows of the files that were not measured again.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for suite in dict.fromkeys(row.suite for row in rows):
        mine = {row.key: row for row in rows if row.suite == suite}
        threads = next(iter(mine.values())).threads
        path = _path(out, suite, threads)
        if add:
            mine = {row.key: row for row in read(out, suite, threads)} | mine
        ordered = list(mine.values())
        content = {
            "conditions": {
                **conditions(),
                "date": time.strftime("%Y-%m-%d %H:%M:%S"),
                "load": os.getloadavg()[0],
                "fma_peak_gflops": fma_peak(threads),
            },
            "rows": [row.dict() for row in ordered],
            "break_even_sparsity": targets.break_even(ordered),
            "verdicts": [dataclasses.asdict(v) | {"word": v.word} for v in verdicts(ordered, out)],
        }
        _replace(path, json.dumps(content, indent=1) + "\n")
        _write_csv(path.with_suffix(".csv"), ordered)
        written += [path, path.with_suffix(".csv")]
        try:
            from .plot import plot
        except ImportError:
            print("no matplotlib, no plot", file=sys.stderr)
            continue
        if plot(ordered, path.with_suffix(".png")):
            written.append(path.with_suffix(".png"))
    return written


def _replace(path: Path, text: str) -> None:
    fresh = path.with_suffix(".tmp")
    fresh.write_text(text)
    fresh.replace(path)


def _write_csv(path: Path, rows: list[Row]) -> None:
    rivals = list(dict.fromkeys(name for row in rows for name in row.rivals))
    extras = list(dict.fromkeys(name for row in rows for name in row.extra))
    fresh = path.with_suffix(".tmp")
    with fresh.open("w", newline="") as file:
        plain = [f.name for f in dataclasses.fields(Row) if f.name not in ("rivals", "extra")]
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*plain, *(f"{name} ms" for name in rivals), *extras])
        for row in rows:
            values = [getattr(row, name) for name in plain]
            values += [row.rivals.get(name, "") for name in rivals]
            values += [row.extra.get(name, "") for name in extras]
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])
    fresh.replace(path)


def verdicts(rows: list[Row], out: Path | None = None) -> list[targets.Verdict]:
    """All that can be judged: of the rows, of their break-even points, against the one-thread file."""
    found = [verdict for row in rows for verdict in targets.judge(row)]
    found += targets.judge_break_even(rows)
    many = [row for row in rows if row.threads > 1]
    if out is not None and many:
        single = [row for suite in dict.fromkeys(row.suite for row in many) for row in read(out, suite, 1)]
        found += targets.judge_threads(many, single)
    return found


def line(row: Row) -> str:
    """One row in one line, as it is measured."""
    text = f"{row.case}, {row.format}, {1 - row.density:.0%}, {row.op}: {row.ms:.3g} ms, {row.speedup:.2f}x"
    for verdict in targets.judge(row):
        text += f"  [{verdict.word} {verdict.ratio:.2f} of {verdict.must:.3g}]"
    return text + (f"  NOISY: spread {row.spread:.0%}, {row.crowd:.1f} cores lost" if row.noisy else "")


def show(rows: list[Row], out: Path | None = None, write_line: Any = print) -> None:
    """Tables of all rows, break-even points and verdicts."""
    from rich.console import Console

    console = Console(width=168, file=None, force_terminal=False)
    for suite in dict.fromkeys(row.suite for row in rows):
        with console.capture() as capture:
            console.print(_table(suite, [row for row in rows if row.suite == suite]))
        write_line(capture.get())
    points = targets.break_even(rows)
    if points:
        write_line("break-even sparsity: " + " · ".join(f"{name}: {s:.0%}" for name, s in points.items()))
    judged = verdicts(rows, out)
    if not judged:
        return
    with console.capture() as capture:
        console.print(_verdict_table(judged))
    write_line(capture.get())
    counts = {word: sum(v.word == word for v in judged) for word in ("stretch", "met", "missed", "noisy")}
    write_line(f"targets: {', '.join(f'{n} {word}' for word, n in counts.items())}")


def _table(suite: str, rows: list[Row]) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    first = rows[0]
    title = f"{suite}, {first.threads} thread(s), {_ops.cpu_isa()}, torch {torch.__version__}, "
    title += f"FMA peak {fma_peak(first.threads):.0f} GF/s. Columns with x: their time over ours"
    peers = [name for name in dict.fromkeys(n for r in rows for n in r.rivals)]
    extras = [name for name in dict.fromkeys(n for r in rows for n in r.extra)]
    table = Table(title=title, box=SIMPLE, padding=(0, 0, 0, 1))
    columns = ["layer", "format", "sparse", "op", "dense ms", "ours ms", "x dense", "spread"]
    flops = any(row.gflops for row in rows)
    columns += [*(f"x {name}" for name in peers), *(["GF/s", "peak"] if flops else []), *extras]
    for column in columns:
        table.add_column(column, justify="left" if column in ("layer", "format", "op") else "right")
    for row in rows:
        name = row.format if row.dtype == "float32" else f"{row.format} {row.dtype}"
        table.add_row(
            row.case,
            name,
            f"{1 - row.density:.0%}",
            row.op,
            f"{row.dense_ms:.3g}",
            f"{row.ms:.3g}",
            f"{row.speedup:.2f}",
            f"{row.spread:.0%}" + (" !" if row.noisy else ""),
            *(f"{row.rivals[p] / row.ms:.2f}" if p in row.rivals else "" for p in peers),
            *([f"{row.gflops:.0f}", f"{row.peak:.0%}"] if flops else []),
            *(f"{row.extra[e]:.3g}" if e in row.extra else "" for e in extras),
        )
    return table


def _verdict_table(judged: Iterable[targets.Verdict]) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(title="against the targets; ratio above 1: met", box=SIMPLE)
    for column in ("figure", "measured", "must", "stretch", "ratio", "verdict"):
        table.add_column(column, justify="left" if column in ("figure", "verdict") else "right")
    for v in judged:
        bound = "<= " if v.at_most else ""
        stretch = "" if v.stretch is None else f"{v.stretch:.3g}"
        table.add_row(v.what, f"{v.value:.3g}", f"{bound}{v.must:.3g}", stretch, f"{v.ratio:.2f}", v.word)
    return table
