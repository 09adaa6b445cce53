"""What a recipe leaves behind: one table on the terminal, `report.json` and `report.png`."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import sparse_kernels
from sparse_kernels import info

# Okabe-Ito: told apart with any colour vision, and in grey.
_DENSE, _SPARSE = "#555555", "#D55E00"


def environment() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sparse_kernels": sparse_kernels.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cpu": info.cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_kernels": info.cpu_kernels(),
    }


def prepare(folder: Path) -> None:
    """Create the folder of a report, before a training whose results it will hold.

    Raises:
        ValueError: it cannot be created, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"out: no report can be written to {folder} ({error.strerror})") from None


def write(
    folder: Path,
    recipe: str,
    config: dict[str, Any],
    results: dict[str, dict[str, Any]],
    pattern: dict[str, Any] | None,
    method: str,
) -> Path:
    """Print the table and write both files.

    Args:
        folder: as `prepare` left it; older reports in it are replaced, each at once or not at all.
        recipe: its name.
        config: its settings.
        results: the figures under "dense" and "sparse".
        pattern: "title", "before" and "after" (grids of counts) of one layer, or None.
        method: name of the training method, as people write it.

    Returns:
        `folder`.
    """
    dense, sparse = results["dense"], results["sparse"]
    content = {
        "recipe": recipe,
        "method": method,
        "dense": dense,
        "sparse": sparse,
        "speedup": dense["step_ms"] / sparse["step_ms"],
        "speedup_with_updates": dense["mean_step_ms"] / sparse["mean_step_ms"],
        "pattern": pattern,
        "environment": environment(),
        "config": {key: str(value) if isinstance(value, Path) else value for key, value in config.items()},
    }
    # The process number keeps two runs into one folder apart.
    json_part, png_part = (folder / f".report.{os.getpid()}.{kind}" for kind in ("json", "png"))
    json_part.write_text(json.dumps(content, indent=2) + "\n")
    plot(content, png_part)
    os.replace(json_part, folder / "report.json")
    os.replace(png_part, folder / "report.png")
    print_table(content)
    print(f"Wrote {folder / 'report.json'} and {folder / 'report.png'}")
    return folder


def rows(content: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table: name, dense, sparse, how they compare."""
    dense, sparse = content["dense"], content["sparse"]
    points = 100 * (sparse["test_accuracy"] - dense["test_accuracy"])

    def row(
        name: str, key: str, form: str, factor: float = 1.0, better: str = "less", worse: str = "more"
    ) -> tuple[str, str, str, str]:
        a, b = dense[key], sparse[key]
        compared = f"{a / b:.1f}x {better}" if a >= b else f"{b / a:.1f}x {worse}"
        return name, form.format(factor * a), form.format(factor * b), compared

    return [
        (
            "Test accuracy",
            f"{dense['test_accuracy']:.1%}",
            f"{sparse['test_accuracy']:.1%}",
            f"{points:+.1f} points",
        ),
        row("Parameters stored", "parameters", "{:,}", 1, "fewer"),
        row("Training FLOPs (dense = 1)", "training_flops", "{:.3f}"),
        row("Training step, median", "step_ms", "{:.2f} ms", 1, "faster", "slower"),
        row("Whole training, updates included", "train_seconds", "{:.1f} s", 1, "faster", "slower"),
        row("Weights + gradients + optimizer", "memory_bytes", "{:.1f} MB", 1e-6),
    ]


def _threads(where: dict[str, Any]) -> str:
    return "1 thread" if where["threads"] == 1 else f"{where['threads']} threads"


def print_table(content: dict[str, Any]) -> None:
    """Print `rows` and what they mean."""
    from rich.console import Console
    from rich.table import Table

    sparse = content["sparse"]
    table = Table(title=f"{content['recipe']}: dense against {_label(content)}")
    table.add_column("")
    for name in ("dense", "sparse", "sparse is"):
        table.add_column(name, justify="right")
    for cells in rows(content):
        table.add_row(*cells)
    console = Console(highlight=False)
    console.print(table)
    index = sparse["memory"]["index"] / 1e6
    threads = _threads(content["environment"])
    notes = [f"Measured on {threads}. The sparse memory includes {index:.1f} MB of index arrays."]
    if sparse["updates"]:
        notes.append(
            f"{sparse['updates']} of {sparse['batches']} batches went to topology updates "
            f"({sparse['update_step_ms']:.1f} ms each)."
        )
    console.print(" ".join(notes))


def _label(content: dict[str, Any]) -> str:
    return f"{content['method']} at {100 * content['config']['sparsity']:g} % sparsity"


def plot(content: dict[str, Any], path: Path) -> None:
    """Draw the report as a PNG: accuracy over training time, and one layer's pattern before and after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pattern, where = content["pattern"], content["environment"]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    if pattern is None:
        _draw_curves(figure.add_subplot(), content)
    else:
        halves: Any = figure.subfigures(1, 2, width_ratios=(1.1, 1))
        _draw_curves(halves[0].add_subplot(), content)
        _draw_pattern(halves[1], pattern)
    figure.suptitle(
        f"{content['recipe']}: {_label(content)}, training steps {content['speedup']:.1f}x as fast as dense",
        fontweight="bold",
    )
    figure.supxlabel(
        f"{where['cpu']}, {_threads(where)} · torch {where['torch']} · "
        f"sparse-kernels {where['sparse_kernels']} · {where['date'][:10]}",
        fontsize=8,
        color="#666666",
    )
    figure.savefig(path, dpi=150, format="png")


def _draw_curves(axes: Any, content: dict[str, Any]) -> None:
    for key, label, colour in (("dense", "dense", _DENSE), ("sparse", _label(content), _SPARSE)):
        side = content[key]
        curve = side["curve"]
        scores = [100 * a for a in curve["test_accuracy"]]
        axes.plot(curve["seconds"], scores, color=colour, linewidth=2, label=label)
        axes.plot(curve["seconds"][-1:], scores[-1:], "o", color=colour)
        axes.annotate(
            f"{scores[-1]:.1f} %\n{curve['seconds'][-1]:.1f} s",
            (curve["seconds"][-1], scores[-1]),
            textcoords="offset points",
            xytext=(0, -10),
            ha="center",
            va="top",
            color=colour,
        )
    lowest = min(min(content[key]["curve"]["test_accuracy"]) for key in ("dense", "sparse"))
    axes.set_ylim(max(0.0, 100 * lowest - 5), 100)
    axes.set_xlim(left=0)
    axes.margins(x=0.08)
    axes.set_xlabel("training time, seconds")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("Test accuracy over training time", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)


def _draw_pattern(figure: Any, pattern: dict[str, Any]) -> None:
    pair: Any = figure.subplots(1, 2)
    top = max(max(map(max, pattern[key])) for key in ("before", "after"))
    for ax, key in zip(pair, ("before", "after"), strict=True):
        image = ax.imshow(pattern[key], cmap="viridis", vmin=0, vmax=top)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_xlabel(f"{key} training")
    figure.suptitle(pattern["title"], fontsize=11)
    figure.colorbar(image, ax=pair, location="right", shrink=0.7)
