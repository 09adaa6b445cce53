"""Does "auto" choose well on this CPU? Times a grid of layers three ways, and judges the rule in `cost.py`.

    python -m bench.auto                          # linear, one thread
    python -m bench.auto --suite conv2d
    python -m bench.auto --fit linear.json ...    # prices for the rule, from files written before

Every case is timed with the sparse kernels, with the dense library on a scratch, and as the plain dense
layer; in turn, in one process. *Regret* is the time of what the rule chose over the better of the first two.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

import sparse_kernels as sk
from sparse_kernels import backend, cost

from .measure import check, in_backend, training_step
from .report import machine
from .timing import Race

LINEAR = ((1024, 1024), (768, 3072), (512, 256), (256, 256), (64, 64), (16, 16))
BATCHES = (1, 4, 16, 64, 256)
#: Channels in and out, side of the image, kernel, stride.
CONV = ((64, 64, 32, 3, 1), (256, 256, 8, 3, 1), (256, 256, 16, 1, 1), (64, 128, 32, 3, 2), (16, 16, 8, 3, 1))
IMAGES = (1, 16, 64)
WAYS = ("cpu", "dense", "plain")
SHOWN = 24  # of the cases that nothing makes as fast as the plain layer


@dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
        suite: "linear" or "conv2d".
        layers: indices into the suite's layers; none: all of them.
        batches: tokens or images; none: the suite's.
        densities: fractions of active weights.
        block_sizes: 1 for single weights (CSR), else the side of a block (BSR).
        dtype: "float32" or "float64".
        threads: torch's thread count.
        budget: seconds for each case.
        out: folder of the JSON file.
        fit: JSON files to compute prices from, instead of measuring.
    """

    suite: str = "linear"
    layers: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    densities: tuple[float, ...] = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    block_sizes: tuple[int, ...] = (1, 4, 16)
    dtype: str = "float32"
    threads: int = 1
    budget: float = 0.2
    out: Path = field(default_factory=lambda: Path("bench/results") / machine() / "auto")
    fit: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Row:
    """One case: what the rule sees, and microseconds of a training step each way."""

    layer: str
    density: float
    step: cost.CpuStep
    cpu: float
    dense: float
    plain: float

    @property
    def chosen(self) -> str:
        """What the rule chooses."""
        rounded = self.step._replace(batch=cost.round_batch(self.step.batch))
        return "dense" if cost.dense_pays(rounded) else "cpu"

    @property
    def regret(self) -> float:
        """Time of what the rule chooses over that of the better one."""
        return float(getattr(self, self.chosen) / min(self.cpu, self.dense))

    @property
    def against_plain(self) -> float:
        """Time of what the rule chooses over that of the plain dense layer."""
        return float(getattr(self, self.chosen) / self.plain)


def build(config: Config, layer: tuple[int, ...]) -> tuple[nn.Linear | nn.Conv2d, tuple[int, ...]]:
    """The plain dense layer, and the shape of an input without its batch."""
    if config.suite == "linear":
        return nn.Linear(*layer), layer[:1]
    inner, out, side, kernel, stride = layer
    return nn.Conv2d(inner, out, kernel, stride, kernel // 2), (inner, side, side)


def measure(config: Config, layer: tuple[int, ...], batch: int, density: float, block: int) -> Row | None:
    """Time one case; None where there is no such layer."""
    dense, size = build(config, layer)
    if size[0] % block or layer[1] % block:
        return None
    dense = dense.to(getattr(torch, config.dtype))
    sparse = type_of(dense).from_dense(dense, density=density, block_size=block)
    x = torch.randn(batch, *size, dtype=dense.weight.dtype)
    y = sparse(x)
    dy, contestants = torch.randn_like(y), {}
    for way in WAYS:
        if way != "plain":
            with sk.use_backend(way):
                check(sparse, x, dy, f"{config.suite} {layer}, {way}")
        one = training_step(dense if way == "plain" else sparse, x, dy)
        contestants[way] = in_backend("auto" if way == "plain" else way, one)
    race = Race(contestants, config.budget).run()
    micros = {way: 1e6 * race.times(way).median for way in WAYS}
    pixels = y.shape[2] * y.shape[3] if y.dim() == 4 else 1
    step = cost.CpuStep(*backend._step(x, sparse.topology, pixels))._replace(batch=batch)
    return Row(f"{config.suite} {'x'.join(map(str, layer))} b{batch} {block}", density, step, **micros)


def type_of(dense: nn.Module) -> type[sk.SparseLinear] | type[sk.SparseConv2d]:
    """The sparse layer for a dense one."""
    return sk.SparseLinear if isinstance(dense, nn.Linear) else sk.SparseConv2d


def report(rows: list[Row]) -> None:
    """How often, and by how much, the rule is wrong, or nothing is as fast as the plain layer."""
    worst = sorted(rows, key=lambda r: -r.regret)
    wrong = [r for r in rows if r.regret > 1.05]
    print(
        f"{len(rows)} cases: regret mean {statistics.fmean(r.regret for r in rows):.3f}, "
        f"worst {worst[0].regret:.2f}; above 1.05 in {len(wrong)}"
    )
    for row in worst[:8]:
        print(
            f"  {row.layer} at {row.density}: chose {row.chosen}, cpu {row.cpu:.0f}, dense {row.dense:.0f} us"
        )
    slower = sorted((r for r in rows if r.against_plain > 1.05), key=lambda r: -r.against_plain)
    print(f"slower than the plain layer by more than 5 %: {len(slower)} of {len(rows)}")
    for row in slower[:SHOWN]:
        print(
            f"  {row.layer} at {row.density}: {row.chosen} {row.against_plain:.2f}x the time "
            f"({getattr(row, row.chosen):.0f} us, plain {row.plain:.0f})"
        )
    if len(slower) > SHOWN:
        print(f"  and {len(slower) - SHOWN} more, less so: the JSON file has them all")


def load(path: Path) -> list[Row]:
    """Rows of a file written by `main`."""
    found = json.loads(path.read_text())["rows"]
    for row in found:
        row["step"] = cost.CpuStep(**row["step"] | {"block_size": tuple(row["step"]["block_size"])})
    return [Row(**row) for row in found]


def fit(rows: list[Row]) -> dict[tuple[str, str], list[float]]:
    """Prices in nanoseconds, none negative, with the least squared *relative* error of the times."""
    from scipy.optimize import nnls

    found = {}
    for kind in ("linear", "conv2d"):
        for way in ("csr", "bsr", "strips", "dense"):
            mine = [r for r in rows if r.step.kind == kind and way in ("dense", r.step.format)]
            # A full CSR weight is no scratch: the values are the dense weight.
            mine = [r for r in mine if way != "dense" or not (r.density == 1 and r.step.format == "csr")]
            if not mine:
                continue
            times = torch.tensor([r.dense if way == "dense" else r.cpu for r in mine]).double() * 1e3
            features = [r.step.dense_features() if way == "dense" else r.step.sparse_features() for r in mine]
            matrix = torch.tensor(features).double()
            prices, _ = nnls((matrix / times[:, None]).numpy(), torch.ones(len(mine)).double().numpy())
            found[kind, way] = [float(f"{p:.3g}") for p in prices]
            error = (matrix @ torch.tensor(prices) / times - 1).abs()
            print(f"{kind} {way}: {len(mine)} rows, error mean {error.mean():.0%}, worst {error.max():.0%}")
    return found


def main(config: Config) -> int:
    """Measure and report, or fit."""
    if config.fit:
        rows = [row for path in config.fit for row in load(path)]
        cost.PRICES |= {key: tuple(prices) for key, prices in fit(rows).items()}
        for key, prices in cost.PRICES.items():
            print(f"    {key}: {prices},".replace("'", '"'))
        report(rows)
        return 0
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    suite = LINEAR if config.suite == "linear" else CONV
    rows = []
    for layer in [suite[i] for i in config.layers] or suite:
        for batch in config.batches or (BATCHES if config.suite == "linear" else IMAGES):
            for block in config.block_sizes:
                for density in config.densities:
                    row = measure(config, layer, batch, density, block)
                    if row is not None:
                        rows.append(row)
    config.out.mkdir(parents=True, exist_ok=True)
    name = f"{config.suite}-{config.dtype}-{config.threads}t"
    name += "".join(f"-{i}" for i in config.layers)
    path = config.out / f"{name}.json"
    kept = [{**asdict(row), "step": row.step._asdict()} for row in rows]
    path.write_text(json.dumps({"cpu": machine(), "torch": torch.__version__, "rows": kept}, indent=1) + "\n")
    report(rows)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    import tyro

    raise SystemExit(main(tyro.cli(Config, description=__doc__)))
